"""Recurrent layers in a plan. oneDNN's LSTM keeps a workspace for its backward, and only oneDNN knows how large.

torch's fake kernel gives it no bytes (torch 2.13), where it is three quarters of what an LSTM of width 256 keeps. So
oneDNN is asked, by running the layer on zeros. What grows with the length of the sequence grows evenly, but for pages.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

ASKED_STEPS = 32  # of a sequence; a longer one is carried on from a half and the whole of it, right to 1 %


class Workspaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give the fake results of oneDNN's LSTM a workspace of the true size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default and torch.is_grad_enabled():
            sequence, weight, hidden = args[0], args[1], args[5]
            steps, batch, width = sequence.shape  # a layer is called with the sequence first
            size = workspace_bytes(steps, batch, width, weight.shape[0], hidden.shape[-1], sequence.dtype)
            out = (*out[:3], torch.empty(size, dtype=torch.uint8))
        return out


@functools.cache
def workspace_bytes(steps: int, batch: int, width: int, gates: int, hidden: int, dtype: torch.dtype) -> int:
    """Size of the workspace of one layer and direction over ``steps`` of ``batch`` x ``width`` inputs."""
    if steps > ASKED_STEPS:
        half, whole = (workspace_bytes(n, batch, width, gates, hidden, dtype) for n in (ASKED_STEPS // 2, ASKED_STEPS))
        return round(whole + (steps - ASKED_STEPS) * 2 * (whole - half) / ASKED_STEPS)
    with unset_fake_temporarily(), torch.enable_grad():  # without gradients there is none
        weights = [torch.zeros(gates, n, dtype=dtype) for n in (width, hidden)] + [torch.zeros(gates, dtype=dtype)] * 2
        state = torch.zeros(batch, hidden, dtype=dtype)
        lstm, layers = 2, 1
        *_, workspace = torch.ops.aten.mkldnn_rnn_layer(
            torch.zeros(steps, batch, width, dtype=dtype), *weights, state, state, False, [], lstm, hidden, layers,
            True, False, False, True,
        )  # fmt: skip
        return int(workspace.numel())


def require_known(model: nn.Module) -> None:
    """Raise ValueError for layers that cuDNN runs on a GPU: the size of the reserve it keeps is known there only."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"{name or 'the model'} is an nn.{type(module).__name__}, for which cuDNN keeps a reserve of a size "
                "that only the GPU tells: run a few steps there and read peak_memory_gib"
            )
