"""Memory planned before it is allocated: training and inference, bytes by role."""
