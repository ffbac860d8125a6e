"""The HTTP server: the only package that knows a web framework."""
