"""Checkpoints of a run, whole on disk or not there at all."""
