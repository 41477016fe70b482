"""A precision: the policy, its backends, and :class:`Precision`, which binds a policy to a live model."""

from mptrain.precision.runtime import Precision

__all__ = ["Precision"]
