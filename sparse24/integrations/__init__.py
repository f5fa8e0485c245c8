"""Sparse24 inside other people's training loops. Import the one you use: each needs its library."""
