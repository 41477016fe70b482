"""Memory of inference by role: weights, KV cache, activations of a prefill, and what the runtime takes beside them.

Weights and KV cache are exact (a paged cache rounds each sequence up to its block, which is not counted). Activations
are the largest set of tensors alive at once in a pass over ``prefill`` tokens, by a formula: kernels are fused
(attention has no scores in memory) and logits are those of each sequence's last token, as in serving engines. The
overhead of the runtime (CUDA context, libraries' workspaces, fragmentation) is an assumption, and a setting. Several
GPUs means tensor parallelism: weights and KV heads are cut between them, while activations and the latents of latent
attention, which belong to all heads, are whole on each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mptrain.formats import Format
from mptrain.memory.inference.architecture import Architecture, Part
from mptrain.memory.inference.weights import FORMATS, KEEP, WIDE, Weights, weigh, weight_format
from mptrain.memory.units import GIB
from mptrain.tools.settings import did_you_mean, require

MOST = 10**9  # sequences, or tokens in one
KV_FORMATS = {
    "fp32": Format.fp32,
    "bf16": Format.bf16,
    "fp16": Format.fp16,
    "fp8": Format.fp8_e4m3,
    "int8": Format.int8,
    "int4": Format.int4,
}


@dataclass(frozen=True)
class Request:
    """The load to be served. ``overhead``: bytes on each GPU; ``prefill``: the most tokens in one pass;
    ``kv_format`` empty: as wide as the computation."""

    batch: int = 1
    input_tokens: int = 2048
    output_tokens: int = 2048
    kv_format: str = ""
    keep: str = KEEP
    keep_format: str = "bf16"
    group_size: int = 0
    prefill: int = 8192
    overhead: int = GIB

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("input_tokens", 1), ("output_tokens", 0), ("prefill", 1)):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            require(least <= value <= MOST, option, value, f"from {least} to {MOST:,}")
        require(self.overhead >= 0, "--overhead", self.overhead, "0 B or more")
        fine = self.group_size == 0 or 8 <= self.group_size <= 2**20
        require(fine, "--group-size", self.group_size, "from 8 to 2^20, e.g. 128")
        if self.keep_format not in WIDE:
            raise ValueError(f"--keep-format={self.keep_format} is unknown{did_you_mean(self.keep_format, [*WIDE])}")
        if self.kv_format and self.kv_format not in KV_FORMATS:
            raise ValueError(f"--kv-format={self.kv_format} is unknown{did_you_mean(self.kv_format, [*KV_FORMATS])}")

    @property
    def tokens(self) -> int:
        """Count the tokens of one sequence when it is complete."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class InferencePlan:
    """Bytes by role on one GPU that holds everything; :meth:`per_gpu` for several."""

    model: str
    format: str
    kv_format: str
    request: Request
    weights: Weights
    roles: dict[str, int] = field(default_factory=dict)
    heads: int = 0
    kv_heads: int = 0  # 0: latents, which belong to all heads

    @property
    def total(self) -> int:
        return sum(self.roles.values())

    def per_gpu(self, gpus: int) -> int:
        """Bytes on the fullest of ``gpus`` that share the layers."""
        weights, cache = -(-self.weights.total // gpus), self.roles.get("kv_cache", 0)
        if self.kv_heads:
            cache = cache * -(-self.kv_heads // gpus) // self.kv_heads
        return weights + cache + self.roles.get("activations", 0) + self.roles["overhead"]

    def splits(self) -> list[int]:
        """Numbers of GPUs that the heads divide by; any up to 1024 where heads are not known."""
        return [n for n in range(1, (self.heads or 1024) + 1) if not self.heads or self.heads % n == 0]

    def gpus_by_bytes(self, memory: int) -> int | None:
        """Return how many GPUs the bytes alone need, however layers are cut; None if the overhead fills each GPU."""
        room = memory - self.roles["overhead"]
        return -(-(self.total - self.roles["overhead"]) // room) if room > 0 else None

    def gpus_needed(self, memory: int) -> int | None:
        """The fewest GPUs of ``memory`` bytes that hold the plan and divide its heads; None if no number does."""
        return next((n for n in self.splits() if self.per_gpu(n) <= memory), None)


def plan(model: Architecture, format_name: str, request: Request, weights: Weights | None = None) -> InferencePlan:
    """The plan of a model; ``weights``: of an earlier plan that differs in the batch. ValueError for what it cannot do,
    naming the option."""
    fmt = weight_format(format_name, request.group_size)
    if model.learned_positions and request.tokens > model.context:
        raise ValueError(
            f"--input-tokens={request.input_tokens} and --output-tokens={request.output_tokens} are {request.tokens:,} "
            f"tokens, and {model.name} has {model.context:,} positions: lower them"
        )
    compute = request.keep_format if fmt.quantized else fmt.name
    kv_format = request.kv_format or compute
    weights = weights or weigh(model.parts(), fmt, request.keep, request.keep_format)
    roles = {
        "weights": weights.quantized + weights.kept,
        "scales": weights.scales,
        "kv_cache": request.batch * kv_bytes(model, request.tokens, kv_format),
        "activations": activations(model, request, FORMATS[compute].element.value.bits // 8),
        "overhead": request.overhead,
    }
    kv_heads = 0 if model.latent.kv_rank else model.kv_heads
    return InferencePlan(model.name, fmt.name, kv_format, request, weights, roles, model.heads, kv_heads)


def plan_count(parameters: int, format_name: str, request: Request) -> InferencePlan:
    """Weights and overhead of so many parameters in one matrix, of which nothing else is known."""
    fmt = weight_format(format_name, request.group_size)
    part = Part("all", "mlp", 1, parameters)
    weights = weigh([part], fmt, "", request.keep_format)
    roles = {"weights": weights.quantized, "scales": weights.scales, "overhead": request.overhead}
    return InferencePlan(f"{parameters:,} parameters", fmt.name, "", request, weights, roles)


def kv_bytes(model: Architecture, tokens: int, kv_format: str) -> int:
    """Cache of one sequence. INT8 and INT4 have an FP16 scale for each token's keys, and values, of each head (for each
    token's latents); FP8's scales, one a layer, are left out."""
    element, heads = KV_FORMATS[kv_format], 1 if model.latent.kv_rank else 2 * model.kv_heads
    bits = model.kv_elements * element.value.bits + heads * 16 * element.value.integer
    return -(-model.kv_tokens(tokens) * bits // 8)


def activations(model: Architecture, request: Request, width: int) -> int:
    """The largest set of tensors alive at once, ``width`` bytes an element, logits in FP32 beside their own format.

    Four of the hidden size: the embeddings, a layer's input, the residual, its norm. With them in attention: queries,
    keys, values, result; in an MLP: gate, up and their product (two wide tensors without a gate); of experts, that for
    each that a token takes, with its copy of the token and result. Kernels are fused: norms, activation functions and
    experts written as single operations of torch take more. To the byte what transformers' Llama and Qwen2 keep alive,
    but for indices and tables of the rotary embedding.
    """
    tokens = max(request.batch, min(request.batch * request.input_tokens, request.prefill))
    size = model.latent
    if size.kv_rank:
        heads = model.heads * (2 * (size.nope + size.rope) + 2 * size.value)
        attention = heads + size.q_rank + size.kv_rank + size.rope
    else:
        attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    wide = 3 if model.gated else 2
    mlps = [wide * model.ffn]
    experts = model.experts
    if experts.routed:
        routed = experts.active * (wide * experts.ffn + 2 * model.hidden)
        mlps = [routed + wide * experts.shared * experts.ffn, *(mlps if experts.dense_layers else [])]
    logits = request.batch * model.vocabulary * (width + 4)
    return max(tokens * (4 * model.hidden + max(attention, *mlps)) * width, logits + tokens * model.hidden * width)


def largest_batch(model: Architecture, format_name: str, request: Request, gpus: int, memory: int) -> int:
    """The largest batch whose plan fits ``gpus`` of ``memory`` bytes each; 0 if not even one sequence does."""
    weights = plan(model, format_name, request).weights

    def fits(batch: int) -> bool:
        return plan(model, format_name, replace(request, batch=batch), weights).per_gpu(gpus) <= memory

    if not fits(1):
        return 0
    low = 1
    while 2 * low <= MOST and fits(2 * low):
        low *= 2
    high = min(2 * low, MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
