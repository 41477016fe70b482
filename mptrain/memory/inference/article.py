"""The planning article's way of counting, to the digit, and what it counts otherwise than bytes are.

Its total for DeepSeek-R1 (671 B parameters, FP8, 30 sequences of 2048 + 2048 tokens) is 671 + 37 + 100.08 = 808.08:
parameters and activated parameters in GB, a cache of full multi-head attention in GiB, added up as one unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from mptrain.memory.inference.architecture import Architecture
from mptrain.memory.inference.plan import KV_FORMATS, Request
from mptrain.memory.inference.weights import WeightFormat
from mptrain.memory.units import GB, GIB


@dataclass(frozen=True)
class Article:
    """Bytes of its three parts. ``activated`` is 0 without experts, where all parameters are used."""

    weights: int
    activated: int
    kv_cache: int

    @property
    def total(self) -> Decimal:
        """GB and GiB added up, as the article does."""
        return Decimal(self.weights + self.activated) / GB + Decimal(self.kv_cache) / GIB

    @property
    def bytes(self) -> int:
        """The same three in one unit."""
        return self.weights + self.activated + self.kv_cache


def article(model: Architecture, parameters: int, activated: int, fmt: WeightFormat, request: Request) -> Article:
    """``parameters`` and ``activated`` as stated (671 B, 37 B); the cache in ``request.kv_format`` or the weights'."""
    bits = fmt.element.value.bits
    kv_bits = KV_FORMATS[request.kv_format].value.bits if request.kv_format else bits
    elements = request.batch * request.tokens * 2 * model.layers * model.hidden
    spent = activated if model.experts.routed else 0
    return Article(parameters * bits // 8, spent * bits // 8, elements * kv_bits // 8)
