"""Kernelised attention in chunks: O(N) time, O(1) state."""
