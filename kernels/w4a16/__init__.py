"""Products of 16-bit activations with 4-bit weights: `product` checks operands and picks the kernel."""
