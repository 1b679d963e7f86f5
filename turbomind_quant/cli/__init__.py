"""The commands `quantize`, `evaluate` and `tmq`: flags in, calls out, tables and JSON out."""
