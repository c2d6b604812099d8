"""Runs the project's kernels as compiled, without a GPU: the PTX that Triton writes, on CPU tensors. See README.md.

For development only: not part of the wheel.
"""
