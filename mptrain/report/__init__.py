"""What people read: the plan before a run and the comparison after it."""
