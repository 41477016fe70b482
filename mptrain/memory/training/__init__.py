"""Memory of a training step, by role."""
