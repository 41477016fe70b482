"""A tensor-parallel linear layer whose arithmetic is not torch's: on what this rank holds of the operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # input [..., K], weight [N, K], bias [N] -> [..., N]


def on_shards(layer: nn.Module, x: Tensor, product: Product) -> Tensor:
    """``product`` of ``x`` and the layer's parameters; of sharded ones, of this rank's parts.

    Rows of the weight cut: the output is cut. Columns cut: partial products are added in FP32 and rounded once, the
    bias then.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    if not hasattr(weight, "placements"):
        return product(x, weight, bias)
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = weight.device_mesh
    assert isinstance(x, DTensor), "parallelize_module hands in sharded inputs"
    if weight.placements[0].is_shard(0):
        rows = x.to_local(grad_placements=[Partial()])
        out = product(rows, weight.to_local(), None if bias is None else bias.to_local())
        return DTensor.from_local(out, mesh, [Shard(-1)], run_check=False)
    part = product(x.to_local(), weight.to_local(), None)
    whole = DTensor.from_local(part.float(), mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return (whole if bias is None else whole + bias).to(part.dtype)
