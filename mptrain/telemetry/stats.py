"""Statistics of a tensor: the one place to add one.

A statistic is a sum over a tensor's elements (or rows): ``measure`` gives the state of one tensor, states of several
tensors, micro-batches or ranks merge by addition, and ``finish`` turns states into figures. The law, tested for every
member of :data:`STATISTICS`: ``finish(measure(a) + measure(b)) == finish(measure(a ++ b))``, rows joined to rows.

    @statistic
    def mean_square(states):                       # [rows, 2] -> figures by name, each [rows]
        return {"mean_square": states[:, 0] / states[:, 1]}

    @mean_square.measured
    def _(x, cast):                                # x: the tensor before its cast; cast: (format, scale) or None
        return torch.stack([x.double().square().sum(), x.new_tensor(x.numel(), dtype=torch.float64)])

That is all: it is measured on every row of a sampled step, stored in its record and shown as a metric. Those without a
``measured`` are the ones that :func:`mptrain.kernels.observe` adds up in its single pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mptrain import kernels
from mptrain.formats import Format
from mptrain.precision.counters import SUMS

Cast = tuple[Format, Tensor] | None
Figures = dict[str, Tensor]


class Statistic:
    """``finish``: states [rows, ...] -> figures [rows] by name, NaN where there is none."""

    def __init__(self, finish: Callable[[Tensor], Figures]) -> None:
        self.name, self.finish = finish.__name__, finish
        self._measure: Callable[[Tensor, Cast], Tensor] | None = None

    @property
    def fused(self) -> bool:
        """Tell whether it is part of the kernels' own pass."""
        return self._measure is None

    def measured(self, measure: Callable[[Tensor, Cast], Tensor]) -> Statistic:
        """Give the measurement of a statistic that the kernels do not know."""
        self._measure = measure
        return self

    def measure(self, x: Tensor, cast: Cast = None) -> Tensor:
        """The state of ``x`` (any float dtype and shape)."""
        if self._measure is not None:
            return self._measure(x, cast)
        shape, dtype = SUMS[self.name]
        state = torch.zeros(shape, dtype=dtype, device=x.device)
        fmt, scale = cast or (None, None)
        kernels.observe(x, kernels.Statistics(**{self.name: state}), fmt=fmt, scale=scale)
        return state


STATISTICS: dict[str, Statistic] = {}


def statistic(finish: Callable[[Tensor], Figures]) -> Statistic:
    """Register a statistic under the name of its ``finish``."""
    registered = Statistic(finish)
    STATISTICS[registered.name] = registered
    return registered


@statistic
def counts(states: Tensor) -> Figures:
    """Shares of elements that saturated, and that were not zero and became zero, at the scale in use. Exact."""
    elements = states[:, 0].double()
    return {"saturated_frac": states[:, 1] / elements, "flushed_frac": states[:, 2] / elements}


@statistic
def errors(states: Tensor) -> Figures:
    """Signal to quantization noise of the cast, 10 log10(sum x^2 / sum error^2); NaN where the cast was exact."""
    ratio = states[:, 0] / states[:, 1]
    return {"sqnr_db": torch.where(ratio.isfinite(), 10.0 * ratio.log10(), torch.nan)}


@statistic
def blocks(states: Tensor) -> Figures:
    """Bits between the largest amax and the median one of blocks of 32 and 128 elements: what block scaling gains."""
    figures = {}
    some = states[:, 0].any(1).nonzero().flatten()
    for index, size in enumerate((32, 128)):
        passed = states[some, index, 1:255].cumsum(1)  # 0: blocks of zeros, 255: of Inf or NaN
        total = passed[:, -1:]
        median, largest = (2 * passed < total).sum(1), (passed < total).sum(1)
        spread = torch.where(total[:, 0] > 0, (largest - median).double(), torch.nan)
        figures[f"spread{size}_bits"] = torch.full((len(states),), torch.nan, dtype=torch.float64).index_copy_(
            0, some, spread
        )
    return figures


@statistic
def histogram(states: Tensor) -> Figures:
    """Magnitudes by FP32's exponent and top three mantissa bits: for the record, where each format is judged by it."""
    return {}
