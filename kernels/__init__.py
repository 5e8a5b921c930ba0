"""Triton kernels of retpop, installed as ``retpop.kernels``; README.md in this folder is about them.

``@triton.jit`` functions and their launchers: tensors in, tensors out. `retpop.ops` imports these modules
when an operation first needs them, so that the library works where Triton is missing.
"""
