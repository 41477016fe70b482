"""Trained models beside each other as they are deployed."""
