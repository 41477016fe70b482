"""Run folders: create, identify, read, export."""
