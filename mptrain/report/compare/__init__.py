"""Comparison of runs, with a verdict."""
