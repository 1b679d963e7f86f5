"""The paged KV cache: its pages, and the rounding of keys and values to 8 bits."""
