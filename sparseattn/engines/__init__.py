"""The engines that make declared maths fast: softmax over a layout, and kernelised attention."""
