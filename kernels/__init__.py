"""Triton kernels of retpop, installed as ``retpop.kernels``; see README.md in this folder.

``@triton.jit`` functions and their launchers: tensors in, tensors out. `retpop.ops` imports these modules
when an operation first needs them, so the library works without Triton.
"""
