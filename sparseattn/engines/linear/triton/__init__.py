"""Kernels of the linear engine in Triton, their tables, and the tiles they are cut into."""
