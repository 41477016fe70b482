"""Backends, the owners of kernels: their protocol, and the choice of one for a policy and a device.

A file of this folder is a backend: ``precision.backend=te`` names te.py, nothing else does. Helpers have an underscore.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mptrain.distributed import Agree
from mptrain.precision.convert import ConversionReport
from mptrain.precision.counters import Counters
from mptrain.precision.policy import AUTO, PrecisionPolicy
from mptrain.tools import registry


class Backend(Protocol):
    """Kernels for one policy on one model. Stateless until :meth:`convert`.

    ``auto_place``: ``precision.backend=auto`` takes the first that is there, in this order. ``emulated``: numerics are
    real, speed is not. ``carrier`` says in a few words what the GEMMs run in.
    """

    name: str
    auto_place: int
    emulated: bool
    carrier: str

    def __init__(self, policy: PrecisionPolicy, device: torch.device, agree: Agree) -> None: ...

    @staticmethod
    def missing(policy: PrecisionPolicy, device: torch.device, *, auto: bool) -> str | None:
        """Why this backend cannot run the policy here, naming a setting that works; None if it can.

        ``auto``: asked while choosing, where a backend that would only be slow counts as missing.
        """

    def convert(self, model: nn.Module, counters: Counters) -> ConversionReport:
        """Swap layers in place (parameters shared) and reserve counter slots."""

    def forward(self, *, policy_on: bool) -> AbstractContextManager[object]:
        """A fresh context for one micro-batch's forward. ``policy_on=False``: converted layers run in FP32."""

    def casts(self, policy_on: bool) -> AbstractContextManager[object]:
        """Fresh casts of the layers that are not converted: the policy's ``compute``, or none at all."""

    def backward(self) -> AbstractContextManager[object]:
        """A fresh context around autograd's backward of one micro-batch: a forward met inside is a replay."""

    def replay(self) -> AbstractContextManager[object]:
        """A fresh context for recomputing a forward inside backward: same casts and scales, nothing counted twice."""

    def state_dict(self) -> dict[str, Tensor]:
        """FP8 scales and amax histories as plain tensors; empty for scalings without state."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue :meth:`state_dict`; layers the state does not hold start from their current amax."""


def load(name: str) -> type[Backend]:
    """The backend class of that name (its module is imported here and not before)."""
    backend: type[Backend] = registry.load(__name__, name).Backend
    return backend


def all_backends() -> list[type[Backend]]:
    """Return every backend in the order of ``auto``. Their modules are light: libraries come when they are used."""
    return sorted((load(name) for name in registry.kinds(__name__)), key=lambda backend: backend.auto_place)


def resolve(policy: PrecisionPolicy, device: torch.device) -> type[Backend]:
    """The backend asked for; under ``auto`` the first that is there. ValueError: what is missing, what works."""
    if policy.backend != AUTO:
        chosen = load(policy.backend)
        reason = chosen.missing(policy, device, auto=False)
        if reason:
            raise ValueError(f"precision.backend={policy.backend} cannot run precision={policy.name}: {reason}")
        return chosen
    reasons = []
    for candidate in all_backends():
        reason = candidate.missing(policy, device, auto=True)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise ValueError(f"no backend can run precision={policy.name} on {device}. " + "; ".join(reasons))
