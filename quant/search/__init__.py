"""From weights and statistics to integers: one decoder block at a time, no file, no learning."""
