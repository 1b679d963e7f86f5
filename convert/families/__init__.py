"""Model families as rows of data, and the layouts of their fused tensors."""
