"""A prepared model, cut up and wrapped for its ranks: DDP, FSDP2's ``fully_shard``, tensor parallel by DTensor plans.

The precision is that of one process. FSDP keeps FP32 shards and gathers each weight in the format its product takes
it in; norms and embeddings, which autocast runs in FP32, are gathered in FP32, in groups of their own.
(The weight of an FP8 layer is rounded to BF16 on the way: dist.gather=fp32 keeps it as it is.) Gradients are summed in
``precision.reduce``, FP32 by default; so are the partial sums of a tensor-parallel product. Each loss is divided by the
number of all micro-batches before its backward, as it is in one process: an average over ranks would make the FP16
gradients of N ranks N times as large on their way, and overflow where one process does not.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mptrain.distributed.layout import PARTS, REPLICAS, SHARDS, DistConfig
from mptrain.distributed.reduction import NotedReduceScatter, Send, look_and_send
from mptrain.tools.modules import parameter_names

COLUMNS, ROWS = "columns", "rows"  # of a product's weight as it is applied: what is cut is the output, or the input


class _Rows(RowwiseParallel):
    """Partial sums are added in FP32 and rounded once."""

    @staticmethod
    def _prepare_output_fn(layouts: Any, local: bool, layer: Any, out: Any, mesh: Any) -> Any:
        whole = out.float().redistribute(placements=layouts).to(out.dtype)
        return whole.to_local() if local else whole


def split_products(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> dict[str, str]:
    """Tensor parallelism: each linear layer that ``plan`` names (a glob -> columns or rows) is cut along that one.

    Returns layer -> how. ValueError if a size does not divide.
    """
    parts = mesh.size()
    cuts: dict[str, str] = {}
    styles: dict[str, ParallelStyle] = {}
    for name, layer in model.named_modules():
        how = next((how for glob, how in plan.items() if fnmatch.fnmatchcase(name, glob)), None)
        if how is None or not isinstance(layer, nn.Linear):
            continue
        size = layer.out_features if how == COLUMNS else layer.in_features
        if size % parts:
            raise ValueError(f"dist.tp={parts} does not divide the {size} {how} of {name}: choose a divisor")
        cuts[name] = how
        styles[name] = ColwiseParallel() if how == COLUMNS else _Rows()
    if not cuts:
        raise ValueError(f"dist.tp={parts}: this model has no plan for tensor parallelism (gpt and llama have)")
    parallelize_module(model, mesh, styles)
    return cuts


def shard(
    model: nn.Module, mesh: DeviceMesh, config: DistConfig, compute: torch.dtype | None, reduce: torch.dtype | None
) -> dict[str, FSDPModule]:
    """FSDP2 on ``model`` in place, over ``mesh`` (shards, or replicas x shards): a group for each block, the head and
    the rest. Returns the groups by name."""
    gathered = None if config.gather == "fp32" or compute is torch.float32 else compute
    narrow = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduce, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    groups: dict[str, FSDPModule] = {}
    names = {module: name for name, module in model.named_modules()}
    for block in getattr(model, "blocks", ()):
        if gathered is not None:
            fully_shard(_uncast(block), mesh=mesh, mp_policy=wide)
        groups[names[block]] = fully_shard(block, mesh=mesh, mp_policy=narrow)
    head = getattr(model, "head", None)
    tied = head is not None and any(m is not head and _holds(m, head.weight) for m in model.modules())
    if isinstance(head, nn.Linear) and not tied:
        groups[names[head]] = fully_shard(head, mesh=mesh, mp_policy=narrow)
    groups[""] = fully_shard(model, mesh=mesh, mp_policy=wide)
    if hasattr(model, "measure"):
        register_fsdp_forward_method(model, "measure")
    return groups


def _uncast(block: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own that autocast does not cast: norms, embeddings."""
    return [m for m in block.modules() if m._parameters and not isinstance(m, nn.Linear)]


def _holds(module: nn.Module, parameter: Any) -> bool:
    return any(own is parameter for own in module._parameters.values())


def cut_up(
    model: nn.Module,
    plan: Mapping[str, str],
    mesh: DeviceMesh,
    config: DistConfig,
    formats: tuple[torch.dtype | None, torch.dtype | None],
    unreduced: dict[str, Tensor],
) -> dict[str, str]:
    """A model that no rank of ``mesh`` holds all of: tensor parallel by ``plan``, then sharded, as far as asked.

    ``formats``: of the products and of the reduction. Returns the layers of tensor parallelism and how they are cut.
    """
    cut = split_products(model, plan, mesh[PARTS]) if mesh[PARTS].size() > 1 else {}
    if config.kind in ("fsdp", "hsdp"):
        over = mesh[SHARDS] if mesh[REPLICAS].size() == 1 else mesh[REPLICAS, SHARDS]
        sum_gradients(model, shard(model, over, config, *formats), unreduced)
    return cut


def replicate(model: nn.Module, mesh: DeviceMesh, unreduced: dict[str, Tensor], send: Send) -> DistributedDataParallel:
    """DDP around ``model``; ``send``: how gradients are summed."""
    group = mesh[REPLICAS].get_group()
    wrapped = DistributedDataParallel(model, process_group=group, static_graph=True, gradient_as_bucket_view=True)
    look_and_send(wrapped, parameter_names(model), unreduced, send)
    return wrapped


def sum_gradients(model: nn.Module, groups: Mapping[str, FSDPModule], unreduced: dict[str, Tensor]) -> None:
    """Gradients are summed, not averaged, and each group notes the norm of what this rank adds, under its name."""
    for name, group in groups.items():
        group.set_custom_reduce_scatter(NotedReduceScatter(f"{name}.*" if name else "*", unreduced))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # PREMUL_SUM, torch's other way, is NCCL's alone


def materialize(model: nn.Module, device: torch.device, initialize: Callable[[], None]) -> None:
    """Put a model that is on meta on its device, shard by shard, with the weights one process would draw."""
    model.to_empty(device=device)
    with _DrawnWhole():  # type: ignore[no-untyped-call]
        initialize()


class _DrawnWhole(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random numbers for a sharded tensor are drawn for all of it, on the CPU as for one process, and the shard kept.

    One whole parameter is in memory at a time.
    """

    DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.DRAWS:
            return func(*args, **(kwargs or {}))
        target = args[0]
        whole = torch.empty(target.shape, dtype=target.dtype)
        func(whole, *args[1:], **(kwargs or {}))
        if hasattr(target, "placements"):
            from torch.distributed.tensor import distribute_tensor

            shard = distribute_tensor(
                whole.to(target.to_local().device), target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(shard.to_local())
        else:
            target.copy_(whole)
        return target


def held_elsewhere(layers: Mapping[str, str], mesh: DeviceMesh) -> Callable[[str, str], bool]:
    """Make the test whether another rank holds the operand (layer, role) too, and counts it.

    ``layers``: those that are cut up.
    """
    first_part = mesh[PARTS].get_local_rank() == 0
    first_copy = mesh[REPLICAS].get_local_rank() == 0 and mesh[SHARDS].get_local_rank() == 0
    whole = {COLUMNS: ("input",), ROWS: ("output", "grad_output")}  # of a layer that is cut up

    def elsewhere(layer: str, role: str) -> bool:
        how = layers.get(layer)
        counted = first_part or (how is not None and role not in whole[how])
        return not counted or (role == "weight" and not first_copy)

    return elsewhere
