"""Results of the library as text and tables for people: one function for each kind of result."""
