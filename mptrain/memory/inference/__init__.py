"""Memory of inference: weights and KV cache."""
