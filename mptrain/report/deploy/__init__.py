"""Comparison of trained models as they are deployed."""
