"""In-place quantization with verification: some of torchao's conversions silently do nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.models._huggingface import as_linear
from mptrain.precision.convert import select
from mptrain.quantization import huggingface, methods
from mptrain.quantization.methods import Method
from mptrain.quantization.packing import BITS, flattened, is_quantized
from mptrain.quantization.report import BYTES_FP32, Layer, Report, reasons
from mptrain.tools.quiet import quiet_import

SHORTEST_ROW = 32
"""Inputs of a layer that is worth it: in shorter rows scale and zero point weigh more than a sixth of the codes."""
SLACK = 1.02  # factor on a rounding error, for the FP32 arithmetic around it


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    method: str | Method,
    *,
    group_size: int | None = None,
    keep: str = "",
    batches: Iterable[Mapping[str, Tensor]] = (),
) -> Report:
    """Quantize the linear layers of ``model`` in place. The report lists every weight, and why it was left as it is.

    ``keep``: full-match regex of module names left as they are; a head tied to its embedding always is.
    ``batches``: calibration data, as the model's forward takes it. Conv1D layers of transformers become linear
    ones. ValueError, naming what to change, if the method is unavailable here, if no layer can be quantized, or
    if torchao's result is not the requested one: the model is then unusable.
    """
    if isinstance(method, str):
        method = methods.named(method)
    size = method.group(group_size)
    why = method.missing(next(model.parameters()).device)
    if why:
        raise ValueError(why)
    if not method.cast and any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError("this model is quantized already: quantize the original")
    as_linear(model)
    if method.cast:
        return _cast(model, method, keep)
    chosen, unquantized = selected(model, method, size, keep)
    if not chosen:
        why = reasons(unquantized) or "it has no linear layers"
        raise ValueError(f"{method.name} would quantize nothing: {why}")
    before = {name: layer.weight.detach() for name, layer in chosen.items()}
    _require_finite(before)
    _convert(model, method, size, chosen, batches)
    layers = {name: _verified(name, model.get_submodule(name), weight, method) for name, weight in before.items()}
    if all(layer.sqnr_db == math.inf for layer in layers.values()):
        raise ValueError(
            f"{method.name} changed no weight by a bit: either it did not quantize, or the weights are what an earlier "
            "quantization left; start from the original"
        )
    return _report(model, method, size, layers, unquantized)


def load_quantized(
    folder: str | Path, method: str = "int8", *, group_size: int | None = None, keep: str = "", device: str = "cpu"
) -> nn.Module:
    """Return the model of a Hugging Face folder, quantized and in eval mode: ``load_quantized("folder", "int8")``.

    ValueError if the folder is incomplete, its architecture unknown, or nothing can be quantized.
    """
    model = huggingface.opened(Path(folder)).to(device)
    quantize_model(model, method, group_size=group_size, keep=keep)
    return model


def selected(
    model: nn.Module, method: Method, size: int | None, keep: str
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the linear layers to quantize in groups of ``size`` (None: rows), and the kept ones with the reason."""
    try:
        linear, unquantized = select(model, keep, multiple=1, setting="--keep")
    except re.error as error:
        raise ValueError(f"--keep={keep} is not a regular expression: {error}") from error
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    chosen = {}
    for name, layer in linear.items():
        others = [other for other in owners[id(layer.weight)] if other != name]
        why = f"its weight is also that of {others[0]} (tied)" if others else _misfit(layer, method, size)
        if why:
            unquantized[name] = why
        else:
            chosen[name] = layer
    return chosen, unquantized


def _misfit(layer: nn.Linear, method: Method, size: int | None) -> str:
    """Return why the method does not fit the layer; empty if it does."""
    inputs = layer.in_features
    if inputs < SHORTEST_ROW:
        return f"in_features={inputs} are too few for a scale: rows of {SHORTEST_ROW} and more are worth it"
    if size is not None and inputs % size:
        fitting = max((d for d in range(methods.SMALLEST_GROUP, size) if inputs % d == 0), default=0)
        hint = f"--group-size {fitting} would" if fitting else "no group size would"
        return f"in_features={inputs} is not a multiple of --group-size {size}; {hint}"
    if inputs % method.multiple or layer.out_features % method.multiple:
        return f"{layer.out_features}x{inputs} is not divisible by {method.multiple}, which FP8 GEMMs need"
    if method.dtype is torch.float8_e4m3fn and not layer.weight.any(dim=1).all():
        return "one of its rows is all zero, of which torchao's FP8 makes NaN"
    return ""


def _require_finite(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds Inf or NaN and has no scale: quantize an earlier checkpoint, or --keep it")


def _convert(
    model: nn.Module,
    method: Method,
    size: int | None,
    chosen: dict[str, nn.Linear],
    batches: Iterable[Mapping[str, Tensor]],
) -> None:
    """Convert the chosen layers, and no others, with torchao. A module in two places is converted once."""
    with quiet_import():
        from torchao.quantization import quantize_

    def chosen_layer(module: nn.Module, name: str) -> bool:
        return name in chosen and not is_quantized(module.weight)  # type: ignore[arg-type]

    config = method.config(size)
    if not method.calibrated:
        quantize_(model, config, filter_fn=chosen_layer)
        return
    with quiet_import():
        from torchao.prototype.smoothquant import SmoothQuantConfig
    quantize_(model, SmoothQuantConfig(config, "prepare", alpha=method.smooth), filter_fn=chosen_layer)
    seen = 0
    for batch in batches:
        model(**batch)
        seen += 1
    if not seen:
        raise ValueError(f"{method.name} must see activations: give quantize_model batches=, or use --to int8-dynamic")
    quantize_(model, SmoothQuantConfig(config, "convert", alpha=method.smooth), filter_fn=chosen_layer)
    places = [*model.named_modules(remove_duplicate=False)]
    for name, old in chosen.items():  # torchao swapped each layer only in its first place
        for alias, module in places:
            if module is old:
                parent, _, leaf = alias.rpartition(".")
                setattr(model.get_submodule(parent), leaf, model.get_submodule(name))


def _verified(name: str, layer: nn.Module, before: Tensor, method: Method) -> Layer:
    """Return the layer's new format, size and error.

    ValueError unless it has the requested tensor class and codes, and each weight is within half a step of the
    original.
    """
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind != method.tensor:
        raise ValueError(
            f"{method.name} did not quantize {name} (a {kind}, not {method.tensor}): "
            f"keep it with --keep {name}, or use another method"
        )
    bits = BITS.get(getattr(weight, "target_dtype", None), 8 * weight.qdata.element_size())
    if weight.qdata.dtype is not method.dtype or bits != method.weight_bits or weight.qdata.shape != before.shape:
        held = f"{bits} bits of {weight.qdata.dtype}, {list(weight.qdata.shape)}"
        raise ValueError(f"{method.name} made {held} of {name}: mptrain does not know this torchao, install 0.18")
    now = weight.dequantize().float()
    pre_scale = getattr(weight, "act_pre_scale", None)
    factor = torch.ones(()) if pre_scale is None else pre_scale.float()  # activations are multiplied by it first
    now, was = now * factor, before.float()
    worst = ((now - was).abs() / (_half_step(weight, was) * factor.abs())).max().item()
    if not worst <= SLACK:
        raise ValueError(
            f"{method.name} moved a weight of {name} by {worst:.3g} half steps, which is not rounding: "
            f"keep it with --keep {name}, or use another method"
        )
    parts, _ = flattened(f"{name}.weight", weight)
    size = sum(part.nbytes for part in parts.values())
    named = f"int{bits}" if weight.qdata.dtype is torch.int8 else "fp8_e4m3"
    return Layer(name, named, before.numel(), size, BYTES_FP32 * before.numel(), sqnr_db(was, now))


def _half_step(weight: Any, was: Tensor) -> Tensor:
    """Return how far rounding may move each weight: half a scale; in E4M3 half a last place, for subnormals 2^-10 of
    the scale. The largest weight of a group clips by another half, which is within the same bound."""
    blocks: Tensor = weight.scale.float()
    if blocks.numel() == 1:
        blocks = blocks.reshape([1] * was.dim())
    for dim, (whole, parts) in enumerate(zip(was.shape, blocks.shape, strict=True)):
        blocks = blocks.repeat_interleave(whole // parts, dim=dim)
    if weight.qdata.dtype is torch.int8:
        return blocks / 2
    return torch.maximum(was.abs() * 2.0**-4, blocks * 2.0**-10)


def sqnr_db(was: Tensor, now: Tensor) -> float:
    """Return the signal over quantization noise, in dB; infinite for the same values."""
    with quiet_import():
        from torchao.quantization import compute_error
    return math.inf if torch.equal(was, now) else float(compute_error(was, now))


def _cast(model: nn.Module, method: Method, keep: str) -> Report:
    """Cast parameters and saved buffers; other buffers stay as the model made them."""
    if keep:
        raise ValueError(f"{method.name} is a change of the whole model: leave --keep out")
    layers = {}
    for name, owner, key, tensor in _tensors(model):
        if not tensor.is_floating_point():
            continue
        cast = tensor.detach().to(method.dtype)
        if (cast.isinf() & tensor.isfinite()).any():
            raise ValueError(f"{name} holds {tensor.abs().max():.3g}, beyond {method.name}: use --to bf16")
        if tensor.dim() > 1:
            error = sqnr_db(tensor.detach().float(), cast.float())
            label = name.removesuffix(".weight")
            layers[label] = Layer(label, method.name, cast.numel(), cast.nbytes, BYTES_FP32 * cast.numel(), error)
        if key in owner._parameters:
            tensor.data = cast  # the same parameter object, so that ties are preserved
        else:
            setattr(owner, key, cast)
    return _report(model, method, None, layers, {})


def _tensors(model: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Return (name, module, name in it, tensor) for each entry of the state_dict; a tied one once."""
    saved = set(model.state_dict())
    seen: set[int] = set()
    tensors = []
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if tensor is not None and name in saved and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors.append((name, module, key, tensor))
    return tensors


def _report(
    model: nn.Module, method: Method, size: int | None, quantized: dict[str, Layer], unquantized: dict[str, str]
) -> Report:
    report = Report(method.name, size)
    multiplied = {id(module.weight): at for at, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module, key, tensor in _tensors(model):
        label = name.removesuffix(".weight")
        if label in quantized:
            report.layers.append(quantized[label])
        elif tensor.dim() < 2:
            report.rest_elements += tensor.numel()
            report.rest_bytes += tensor.nbytes
        else:
            count, bits = tensor.numel(), 8 * tensor.element_size()
            named = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
                tensor.dtype, f"{bits} bits"
            )
            why = unquantized.get(label) or _not_linear(module, key, multiplied.get(id(tensor)))
            report.layers.append(Layer(label, named, count, tensor.nbytes, BYTES_FP32 * count, kept=why))
    return report


def _not_linear(module: nn.Module, key: str, tied: str | None) -> str:
    if isinstance(module, nn.Embedding):
        return f"an embedding, and the weight of {tied} (tied)" if tied else "an embedding: it is looked up"
    return f"{key} of {type(module).__name__}, which is not a linear layer"
