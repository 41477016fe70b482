"""The protocol of a backend (the owner of kernels) and the choice of one for a policy and a device."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mptrain.distributed import Agree
from mptrain.precision.convert import ConversionReport
from mptrain.precision.counters import Counters
from mptrain.precision.policy import BackendName, PrecisionPolicy

MODULES = {
    "autocast": "mptrain.precision.backends.autocast",
    "te": "mptrain.precision.backends.transformer_engine",
    "native": "mptrain.precision.backends.native",
    "emulated": "mptrain.precision.backends.emulated.backend",
}
QUANTIZED_ORDER = ("te", "native", "emulated")
PLAIN_ORDER = ("autocast", "emulated")


class Backend(Protocol):
    """Kernels for one policy on one model. Stateless until :meth:`convert`.

    ``emulated``: numerics are real, speed is not. ``carrier`` says in a few words what the GEMMs run in.
    """

    name: str
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
    backend: type[Backend] = importlib.import_module(MODULES[name]).Backend
    return backend


def resolve(policy: PrecisionPolicy, device: torch.device) -> type[Backend]:
    """The backend asked for; under ``auto`` the first that is there. ValueError: what is missing, what works."""
    if policy.backend is not BackendName.auto:
        chosen = load(policy.backend.value)
        reason = chosen.missing(policy, device, auto=False)
        if reason:
            raise ValueError(f"precision.backend={policy.backend.value} cannot run precision={policy.name}: {reason}")
        return chosen
    reasons = []
    for name in QUANTIZED_ORDER if policy.quantized else PLAIN_ORDER:
        candidate = load(name)
        reason = candidate.missing(policy, device, auto=True)
        if reason is None:
            return candidate
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend can run precision={policy.name} on {device}. " + "; ".join(reasons))
