"""What a decoder block needs beside int4 products and attention: norms, sums, RoPE, SiLU, and one token through a float weight."""
