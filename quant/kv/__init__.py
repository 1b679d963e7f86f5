"""Parameters of the static int8 KV cache, and keys made alike for it."""
