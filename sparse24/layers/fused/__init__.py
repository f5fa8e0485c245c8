"""Feed-forward blocks that run as one function: which can, what they are given, and whether they are still the same."""
