"""What the library can do, by subject. `turbomind_quant` itself hands the functions on; nothing here prints or reads flags."""
