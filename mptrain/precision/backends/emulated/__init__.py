"""Exact numerics of formats this machine has no unit for: real operands, real rounding, borrowed GEMMs."""

from mptrain.precision.backends.emulated.backend import Backend

__all__ = ["Backend"]
