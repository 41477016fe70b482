"""Memory plans: the bytes of a training step and of inference, by role, before anything is allocated."""
