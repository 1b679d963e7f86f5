"""A quantized checkpoint in another format: the same codes, scales and zero points, moved."""
