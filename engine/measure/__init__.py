"""Perplexity and throughput, measured."""
