"""The softmax engine's Triton kernels; `in_triton.py` beside this folder launches them."""
