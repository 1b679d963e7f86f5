"""Numerics: int4 group quantization, packing orders and Triton kernels. Import from the modules of this package."""
