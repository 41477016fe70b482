"""torchao's tensors as plain ones for a file, and back; codes of four bits two to a byte.

torchao's ``Intx`` tensors are the only INT4 it runs on a CPU, and hold each code in a byte of its own.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mptrain.quiet import quiet_import

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch has it, its stubs do not
PACKED = ".packed"  # at the end of a name: two codes to a byte, the first in the low half


def pack(codes: Tensor) -> Tensor:
    """Codes of -8 to 7 (int8, any shape) -> uint8 [ceil(count / 2)], in order, the first in the low half of a byte."""
    assert codes.dtype == torch.int8
    assert not codes.numel() or (codes.min() >= -8 and codes.max() <= 7), "codes beyond four bits"
    flat = codes.reshape(-1).view(torch.uint8) & 0xF
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    low, high = flat.view(-1, 2).unbind(1)
    return low | (high << 4)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What :func:`pack` made of codes of this shape. ValueError if there are too few or too many bytes for it."""
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} do not hold {count} codes of four bits")
    flat = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(-1)[:count].view(torch.int8)
    return ((flat ^ 8) - 8).view(shape)


def is_quantized(tensor: Tensor) -> bool:
    """Is it one of torchao's?"""
    with quiet_import():
        from torchao.utils import TorchAOBaseTensor
    return isinstance(tensor, TorchAOBaseTensor)


def flattened(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plain tensors that a quantized weight is stored as, and what else it takes to make it again (JSON)."""
    with quiet_import():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    tensors, metadata = flatten_tensor_state_dict({name: weight.detach()})
    about: dict[str, Any] = {"torchao": json.loads(metadata[name])}
    if getattr(weight, "target_dtype", None) is INT4:
        (codes,) = (key for key in tensors if key.endswith("_qdata"))
        about["packed"] = {codes: list(tensors[codes].shape)}
        tensors[codes + PACKED] = pack(tensors.pop(codes))
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, about


def restored(name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> Tensor:
    """The weight that :func:`flattened` took apart; its tensors are taken out of ``tensors``. ValueError if one is
    missing."""
    with quiet_import():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    module, _, leaf = name.rpartition(".")
    found = {}
    for part in about["torchao"]["_tensor_data_names"]:
        key = f"{module}._{leaf}_{part}"
        shape = about.get("packed", {}).get(key)
        stored = key if shape is None else key + PACKED
        if stored not in tensors:
            raise ValueError(f"{stored} is not there")
        tensor = tensors.pop(stored)
        found[key] = tensor if shape is None else unpack(tensor, tuple(shape))
    metadata = {"tensor_names": json.dumps([name]), name: json.dumps(about["torchao"])}
    made, _ = unflatten_tensor_state_dict(found, metadata)
    weight: Tensor = made[name]
    return weight
