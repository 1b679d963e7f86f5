"""Products of a mixture of experts: every token through the experts that its router chose, in a few kernels."""
