"""The HTTP routes, one module per idea. Each has a function that makes its router from a Service."""
