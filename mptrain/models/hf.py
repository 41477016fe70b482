"""A causal language model that Hugging Face's transformers builds from a ``config.json``, trained from scratch.

``python train.py model=hf model.config=PATH``. The loss is plain cross-entropy: what some mixtures of experts add to it
to balance their routers is left out. Linear layers are ``nn.Linear``, whatever the architecture calls them, so that FP8
finds them; the experts of a mixture share one parameter, and compute in the precision's other format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.models import _experts, _huggingface
from mptrain.models._base import BaseConfig
from mptrain.models._decoder import EXAMPLE_LENGTH, require_vocabulary

INPUT = "tokens"
TENSOR_PARALLEL: dict[str, str] = {}
OLDEST = 5  # transformers' major version: older ones have no choice of experts


@dataclass(frozen=True)
class Config(BaseConfig):
    """``config``: a config.json or its folder. What is left out is the file's, and filled in here.

    ``vocab_size`` 0: the data's; ``n_layer``: the first so many; ``block_size``: tokens of a sequence. ValueError names
    the setting that cannot work.
    """

    config: str = ""
    vocab_size: int = -1
    block_size: int = 256
    n_layer: int = 0

    def __post_init__(self) -> None:
        if not self.config:
            raise ValueError("hf: config is empty: model=hf needs model.config=PATH, a Hugging Face config.json")
        for name, least in (("vocab_size", -1), ("block_size", 1), ("n_layer", 0)):
            if getattr(self, name) < least:
                works = f"try model.{name}={getattr(type(self), name)}"
                raise ValueError(f"hf: {name}={getattr(self, name)} must be at least {least}; {works}")
        described = _described(self.config, self.vocab_size, self.n_layer)
        object.__setattr__(self, "vocab_size", described.vocab_size if self.vocab_size else 0)
        object.__setattr__(self, "n_layer", described.num_hidden_layers)
        room = getattr(described, "max_position_embeddings", None) or self.block_size
        if self.block_size > room:
            raise ValueError(f"hf: block_size={self.block_size}: {self.config} has {room} positions; try "
                             f"model.block_size={room}")  # fmt: skip

    @property
    def digest(self) -> str:
        """A hash of the file's settings: equal paths need not be equal models."""
        return hashlib.sha256(json.dumps(_read(self.config), sort_keys=True).encode()).hexdigest()[:16]


def _described(path: str, vocab_size: int, n_layer: int) -> Any:
    """transformers' configuration of the file, with this vocabulary and depth where they are above 0."""
    where = f"model.config={path}"
    settings = _read(path)
    config_class = _huggingface.class_of(settings, where)
    if config_class.sub_configs:
        raise ValueError(
            f"{where}: a {settings['model_type']} is made of several models: only a single one can be built"
        )
    keys = {name: config_class.attribute_map.get(name, name) for name in ("num_hidden_layers", "vocab_size")}
    whole = _huggingface.config_of(settings, where)
    _require_causal(whole, where)
    for name in keys:
        size = getattr(whole, name, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: {keys[name]}={size} must be a whole number above 0")
    if 0 < vocab_size != whole.vocab_size:  # other tokens: the file's padding is none of them
        settings |= {keys["vocab_size"]: vocab_size, "pad_token_id": None}
    if 0 < n_layer != whole.num_hidden_layers:
        settings = _of_depth(settings, whole.num_hidden_layers, n_layer) | {keys["num_hidden_layers"]: n_layer}
    return _huggingface.config_of(settings, where)


def _require_causal(described: Any, where: str) -> None:
    with _huggingface.silent():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        known, masked = type(described) in MODEL_FOR_CAUSAL_LM_MAPPING, type(described) in MODEL_FOR_MASKED_LM_MAPPING
    sees_all = described.is_encoder_decoder or (masked and not getattr(described, "is_decoder", False))  # as BERT does
    if sees_all or not known:
        raise ValueError(f"{where}: a {described.model_type} is not a causal language model")


def _of_depth(settings: dict[str, Any], depth: int, n_layer: int) -> dict[str, Any]:
    """Settings whose lists of one value a layer are cut to the first ``n_layer``, of ``depth``."""
    of_layers = [key for key in settings if key != "architectures" and "token" not in key]
    lists = {key: settings[key] for key in of_layers if isinstance(settings[key], list) and len(settings[key]) == depth}
    if lists and n_layer > depth:
        named = ", ".join(lists)
        raise ValueError(f"hf: n_layer={n_layer}: the file has {named} for {depth} layers; try model.n_layer={depth}")
    return settings | {key: value[:n_layer] for key, value in lists.items()}


def _read(path: str) -> dict[str, Any]:
    """The settings in a config.json. ValueError for one that is missing, torn, or of a quantized model."""
    where = f"model.config={path}"
    _huggingface.require_installed(where)
    _require_new_transformers(where)
    try:
        settings = json.loads(_huggingface.file_of(Path(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: no config.json can be read there ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not whole JSON ({error}): fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds no mapping of settings: it is not the config.json of a model")
    for key in ("quantization_config", "dtype", "torch_dtype"):  # how weights were stored; ours are drawn, in FP32
        settings.pop(key, None)
    return settings


@cache
def _require_new_transformers(where: str) -> None:
    with _huggingface.silent():
        import transformers
    if int(transformers.__version__.partition(".")[0]) < OLDEST:
        raise ValueError(f"{where} needs transformers {OLDEST} or newer, not {transformers.__version__}: "
                         "pip install -U transformers")  # fmt: skip


def _made(config: Config) -> nn.Module:
    """transformers' model on torch's default device."""
    described = _described(config.config, config.vocab_size, config.n_layer)
    described.use_cache = False
    with _huggingface.silent():
        from transformers import AutoModelForCausalLM

        _experts.register()
        try:
            made: nn.Module = AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, experts_implementation=_experts.NAME
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever sizes that do not fit run into
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"model.config={config.config}: no {described.model_type} can be built of it: {said}"
            ) from error
    return made


class HuggingFace(nn.Module):
    """transformers' model ``net``, called as ours are: tokens in, logits or loss out."""

    def __init__(self, config: Config, net: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.net: Any = net
        self._recompute: Callable[..., Any] | None = None
        self._first_buffers = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers."""
        depth = self.config.n_layer
        for module in self.net.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ValueError(
            f"model.config={self.config.config}: a {self.net.config.model_type} has no list of {depth} layers"
        )

    @property
    def embed(self) -> nn.Module:
        """The embedding of the tokens."""
        embedding: nn.Module = self.net.get_input_embeddings()
        return embedding

    @property
    def head(self) -> nn.Module:
        """The product that makes the logits."""
        product: nn.Module = self.net.get_output_embeddings()
        return product

    @property
    def recompute(self) -> Callable[..., Any] | None:
        """Activation checkpointing, given by the caller: in training, layers run as ``recompute(layer, x)``, where
        ``layer`` has the layer's other arguments bound."""
        return self._recompute

    @recompute.setter
    def recompute(self, run: Callable[..., Any] | None) -> None:
        if not self.net.supports_gradient_checkpointing:
            kind = self.net.config.model_type
            raise ValueError(f"a {kind} of transformers cannot recompute its layers: set trainer.checkpointing=false")
        self._recompute = run
        # transformers' public way sets the same two attributes, but takes no function.
        self.net._set_gradient_checkpointing(enable=run is not None, gradient_checkpointing_func=run)

    def reset_parameters(self) -> None:
        """transformers' first weights; also what fills a meta model, buffers and all, after ``to_empty``."""
        self.net.tie_weights()  # to_empty makes one parameter of each: tie them again
        for module in self.net.modules():
            module._is_hf_initialized = False
        self.net.initialize_weights()
        for name, first in self._first_buffers.items():
            self.net.get_buffer(name).copy_(first)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """``tokens``, ``targets`` [B, T] int64 -> mean loss in nats, or logits [B, T, vocab_size] without targets."""
        length, limit = tokens.shape[1], self.config.block_size
        if length > limit:
            raise ValueError(f"{length} tokens are more than block_size={limit}; set model.block_size={length}")
        with _one_sequence_a_row():
            logits: Tensor = self.net(input_ids=tokens, use_cache=False, return_dict=True).logits
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token at full ``block_size``.

        6 per weight of a matrix product that a token meets (of a mixture, its chosen experts'), and attention's two
        products in full, as if no layer were causal or had a window. What linear attention does beside its matrix
        products is not counted.
        """
        config = self.net.config
        weights: float = 0.0
        for module in self.blocks.modules():
            own = dict(module.named_parameters(recurse=False))
            if hasattr(module, "is_transposed"):  # experts, in one parameter for each product
                met = config.num_experts_per_tok / int(module.num_experts)  # type: ignore[arg-type]
                weights += met * sum(p.numel() for p in own.values() if p.ndim == 3)
            elif "weight" in own and own["weight"].ndim == 2:
                weights += own["weight"].numel()
        head: Any = self.head
        weights += head.weight.numel()
        return 6.0 * weights + _attention_flops(config, self.config.block_size)

    def example(self, rows: int) -> dict[str, Tensor]:
        """A random batch of about ``rows`` tokens, as ``forward`` takes it."""
        length = min(EXAMPLE_LENGTH, self.config.block_size)
        shape = (max(1, rows // length), length)
        tokens = torch.randint(self.config.vocab_size, shape, device=next(self.parameters()).device)
        return {"tokens": tokens, "targets": tokens}


def _attention_flops(config: Any, length: int) -> float:
    """Count the FLOPs of the products of queries and keys and of weights and values, forward and backward, for one
    token.
    """
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    widths = (getattr(config, "qk_head_dim", None) or width) + (getattr(config, "v_head_dim", None) or width)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers: int = sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)
    return 6.0 * float(layers * heads * widths * length)


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """transformers looks in the positions for several sequences in one row, to mask them from each other: a host read,
    which tensors without data cannot have. There are none here."""
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def build(config: Config) -> HuggingFace:
    """A freshly initialized model on torch's default device, from torch's global random state."""
    require_vocabulary("hf", config.vocab_size)
    if torch.get_default_device().type != "meta":
        net = _made(config)
        _huggingface.as_linear(net)
        return HuggingFace(config, net)
    with torch.device("cpu"), _huggingface.weightless():  # buffers with their values: to_empty loses them
        net = _made(config)
    _huggingface.as_linear(net)
    return HuggingFace(config, net).to("meta")


def grows_evenly(config: Config, start: int, step: int) -> bool:
    """Tell whether every ``step`` layers after the first ``start`` hold and attend as the ones before."""
    try:
        replace(config, n_layer=start)
    except ValueError:  # the file describes each layer, in a way that cannot be cut
        return False
    with torch.device("meta"):
        model = build(config)
    kinds = getattr(model.net.config, "layer_types", None) or [""] * config.n_layer
    layers = [(kind, [p.shape for p in layer.parameters()]) for kind, layer in zip(kinds, model.blocks, strict=True)]
    return layers[start:-step] == layers[start + step :]


def sizes(settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, int]:
    """Read off the weights what the data decided: the vocabulary, where the settings leave it to the data."""
    if settings.get("vocab_size", -1) != 0:
        return {}
    with torch.device("meta"):
        model = build(Config(**settings | {"vocab_size": 1}))
    name = next(name for name, p in model.named_parameters() if p is model.embed.weight)
    return {"vocab_size": len(state[name])}


def hugging_face(config: Config, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model as transformers': its config.json and its tensors, GPT-2's transposed again (Conv1D)."""
    described = _described(config.config, config.vocab_size, config.n_layer)
    with torch.device("meta"):
        net: Any = _made(config)
    transposed = {f"{name}.weight" for name in _huggingface.conv1d_layers(net)}
    names = dict(net.named_parameters()) | {name: b for name, b in net.named_buffers() if name in net.state_dict()}
    tensors = {name: state[f"net.{name}"] for name in names}
    tensors = {name: tensor.t() if name in transposed else tensor for name, tensor in tensors.items()}
    return described.to_dict() | {"architectures": [type(net).__name__]}, tensors
