"""Calibration, search, rounding, KV parameters, the resumable run; the `quantize` and `evaluate` commands."""
