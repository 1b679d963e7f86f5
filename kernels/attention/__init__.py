"""Attention over the paged KV cache: `paged` is what callers use, the other modules are its kernels."""
