"""Benchmarks of feed-forward layers, blocks and training steps: for `python -m sparse24 bench` and bench/."""
