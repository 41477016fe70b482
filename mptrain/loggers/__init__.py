"""Where a run's figures go: one file a sink."""
