"""Entry points: the one place that parses flags and writes files."""
