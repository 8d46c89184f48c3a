"""Softmax over a layout."""
