"""Weights that somebody else writes: copies, loads, other optimizers, merged adapters, `.data`. Each way has a file."""
