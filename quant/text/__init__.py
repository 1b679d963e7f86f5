"""The calibration text of a run, read or written by the model itself."""
