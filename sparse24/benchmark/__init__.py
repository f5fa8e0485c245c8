"""Benchmarks of feed-forward layers, blocks and training steps: `python -m sparse24 bench`, and the scripts in bench/."""
