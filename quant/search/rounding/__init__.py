"""Codes of one stack of linears: error compensation, descent, and the targets they aim at."""
