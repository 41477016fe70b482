"""Mixtures of experts of Hugging Face's transformers, in products that every precision knows.

transformers' own ways do not fit here: ``grouped_mm`` runs in FP32 under autocast and under our emulation, for neither
knows that operator; ``batched_mm`` copies a weight for each token; the loop over experts has shapes that depend on the
data, which a plan of memory has not. Here every expert's rows go through ``F.linear``; how many each one has is one
host read a layer. On tensors without data, as a plan has them, each expert gets the same share: what is kept for
backward, added up over the experts, is the same for any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAME = "mptrain"
"""The name of this implementation among those that transformers knows."""

MOST = 16
"""Products of a mixture that a plan looks at: 256 would take it minutes."""


def register() -> None:
    """Make :func:`run_experts` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)


def run_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """``hidden`` [rows, width] through the experts ``chosen`` [rows, k] for each row, summed by ``weights`` [rows, k].

    ``experts``: a module of transformers with all experts' weights in one parameter for each product.
    """
    k = chosen.shape[-1]
    order = chosen.flatten().argsort(stable=True)  # pairs of row and expert, expert by expert
    shares = _shares(chosen, experts.num_experts)
    parts = hidden[order // k].split_with_sizes(shares)
    x = _products(experts, "gate_up_proj" if experts.has_gate else "up_proj", parts)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = _products(experts, "down_proj", x.split_with_sizes(shares))
    if experts.has_post_expert_norm:
        x = experts.post_expert_norm(x)
    x = x * weights.flatten()[order, None]
    back = order.argsort()  # sums in a fixed order, which index_add_ on a GPU does not have
    return x[back].view(len(hidden), k, -1).sum(1).to(hidden.dtype)


def _products(experts: Any, name: str, parts: Any) -> Tensor:
    """Each expert's product on its rows, one below the other; ``parts``: of an expert, or of as many as there are."""
    together = experts.num_experts // len(parts)
    weights = getattr(experts, name).split(together)
    biases = getattr(experts, f"{name}_bias").split(together) if experts.has_bias else [None] * len(weights)
    return torch.cat([_product(*given, experts.is_transposed) for given in zip(parts, weights, biases, strict=True)])


def _product(rows: Tensor, weights: Tensor, biases: Tensor | None, transposed: bool) -> Tensor:
    if len(weights) == 1:
        bias = None if biases is None else biases[0]
        return F.linear(rows, weights[0].t() if transposed else weights[0], bias)
    each = torch.bmm(rows.view(len(weights), -1, rows.shape[-1]), weights if transposed else weights.mT)
    return (each if biases is None else each + biases[:, None]).flatten(0, 1)


def _shares(chosen: Tensor, experts: int) -> list[int]:
    """Rows of each expert. Without data, an expert too many for a plan to look at alone goes with its neighbours."""
    rows = chosen.numel()
    if chosen.is_meta or isinstance(chosen, FakeTensor):
        groups = experts if experts <= MOST or experts % MOST or rows % experts else MOST
        each, more = divmod(rows, groups)
        return [each + (number < more) for number in range(groups)]
    counts: list[int] = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    return counts
