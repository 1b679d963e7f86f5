"""Continuous batching: paged KV cache, scheduler, sampling, CUDA graphs."""
