"""Activation statistics: hidden states of the calibration text, and what is kept of them."""
