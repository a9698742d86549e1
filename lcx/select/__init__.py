"""Selectors: which keys a query sees. Pure functions, one idea a file."""
