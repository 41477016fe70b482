"""The tensors of one recorded step."""
