"""AWQ "gemm" checkpoints, written."""
