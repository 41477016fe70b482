"""Exact numerics of formats this machine has no unit for: real operands, real rounding, borrowed GEMMs."""
