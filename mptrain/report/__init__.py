"""Pages and tables for people: the plan before a run and the comparison after it."""
