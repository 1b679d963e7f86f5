"""Kernels of the search: choice of clip ranges, and the column sweeps of compensated rounding."""
