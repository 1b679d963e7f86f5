"""Sources that are published in 8 bits or fewer, read as the floats that they stand for."""
