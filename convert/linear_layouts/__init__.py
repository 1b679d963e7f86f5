"""How a 4-bit linear lies in safetensors files: one module for each format, and the table of them."""
