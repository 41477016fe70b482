"""Runs beside each other, with a verdict."""
