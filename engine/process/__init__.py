"""The engine in a process of its own, and the ranks of tensor parallelism."""
