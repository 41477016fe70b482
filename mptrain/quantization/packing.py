"""torchao's tensors as plain tensors for a file, and back; two 4-bit codes or four 2-bit codes to a byte.

torchao's ``Intx`` tensors are the only INT4 and INT2 it runs on a CPU, and hold each code in its own byte.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mptrain.tools.quiet import quiet_import

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch has it, its stubs do not
INT2: torch.dtype = torch.int2  # type: ignore[attr-defined]
BITS: dict[Any, int] = {INT4: 4, INT2: 2}
PACKED = ".packed"  # suffix of a name: several codes per byte, the first in the lowest bits


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack signed codes of 4 or 2 ``bits`` (int8, any shape) into uint8 [ceil(count * bits / 8)], in order, the
    first in the lowest bits of a byte."""
    assert codes.dtype == torch.int8
    half, each = 1 << (bits - 1), 8 // bits
    assert not codes.numel() or (codes.min() >= -half and codes.max() < half), f"codes beyond {bits} bits"
    flat = codes.reshape(-1).view(torch.uint8) & (2 * half - 1)
    flat = torch.cat((flat, flat.new_zeros(-flat.numel() % each))).view(-1, each)
    packed = flat[:, 0].clone()
    for place in range(1, each):
        packed |= flat[:, place] << (bits * place)
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...], bits: int = 4) -> Tensor:
    """Restore the codes of this shape that :func:`pack` packed.

    ValueError if there are too few or too many bytes for it.
    """
    count, half, each = torch.Size(shape).numel(), 1 << (bits - 1), 8 // bits
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // each):
        words = {4: "four", 2: "two"}
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} do not hold {count} codes of {words[bits]} bits")
    parts = torch.stack([(packed >> (bits * place)) & (2 * half - 1) for place in range(each)], dim=-1)
    flat = parts.view(-1)[:count].view(torch.int8)
    return ((flat ^ half) - half).view(shape)


def is_quantized(tensor: Tensor) -> bool:
    """Return whether it is one of torchao's tensors."""
    with quiet_import():
        from torchao.utils import TorchAOBaseTensor
    return isinstance(tensor, TorchAOBaseTensor)


def flattened(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the plain tensors that store a quantized weight, and the metadata to rebuild it (JSON)."""
    with quiet_import():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    tensors, metadata = flatten_tensor_state_dict({name: weight.detach()})
    about: dict[str, Any] = {"torchao": json.loads(metadata[name])}
    bits = BITS.get(getattr(weight, "target_dtype", None))
    if bits is not None:
        (codes,) = (key for key in tensors if key.endswith("_qdata"))
        about["packed"] = {codes: list(tensors[codes].shape)}
        tensors[codes + PACKED] = pack(tensors.pop(codes), bits)
        about["bits"] = bits
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, about


def restored(name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Tensor:
    """Rebuild the weight that :func:`flattened` took apart, removing its parts from ``tensors``. ValueError if one
    is missing.

    ValueError if one is missing.
    """
    with quiet_import():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    module, _, leaf = name.rpartition(".")
    parts = {}
    for part in about["torchao"]["_tensor_data_names"]:
        key = f"{module}._{leaf}_{part}"
        shape = about.get("packed", {}).get(key)
        stored = key if shape is None else key + PACKED
        if stored not in tensors:
            raise ValueError(f"{stored} is not there")
        tensor = tensors.pop(stored)
        parts[key] = tensor if shape is None else unpack(tensor, tuple(shape), about.get("bits", 4))
    metadata = {"tensor_names": json.dumps([name]), name: json.dumps(about["torchao"])}
    weights, _ = unflatten_tensor_state_dict(parts, metadata)
    weight: Tensor = weights[name]
    return weight
