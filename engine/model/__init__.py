"""The one forward pass: blocks that calibration taps, perplexity runs and serving batches."""
