"""Learned rounding of a block and distillation of a whole model."""
