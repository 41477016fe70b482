"""Run folders: claimed, told apart, read again, exported."""
