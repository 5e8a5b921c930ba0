"""Triton kernels of retpop, installed as ``retpop.kernels``.

This folder holds the ``@triton.jit`` functions and their launchers: tensors in, tensors out. It has no
kernels yet; :mod:`retpop.ops` runs the pure-torch backend until they land.
"""
