"""A decoder model as numbers, and what follows from them exactly: its tensors, parameters and KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GROUPS = ("embed", "attention", "mlp", "experts", "router", "norm", "head")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads come from ``kv_rank`` numbers a
    token and ``rope`` more, and these are what is cached. ``kv_rank`` 0: there is none; ``q_rank`` 0: full queries."""

    kv_rank: int = 0
    q_rank: int = 0
    rope: int = 0
    nope: int = 0
    value: int = 0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts of width ``ffn``: each token takes ``active`` of ``routed`` and all ``shared``. The first
    ``dense_layers`` have a plain MLP. ``routed`` 0: there are none."""

    routed: int = 0
    active: int = 0
    shared: int = 0
    ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Biases:
    """Which layers add a vector. ``latent``: the down-projections of latent attention."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False
    norm: bool = False
    latent: bool = False


@dataclass(frozen=True)
class Part:
    """Equal tensors: ``copies`` matrices [rows, columns], and ``vectors`` elements (biases, norms) that no format
    quantizes. ``used``: elements that one token reads or multiplies by. ``alias``: a second name (a tied head)."""

    name: str
    group: str
    rows: int = 0
    columns: int = 0
    copies: int = 1
    vectors: int = 0
    used: int = 0
    alias: str = ""

    @property
    def matrix_elements(self) -> int:
        return self.rows * self.columns * self.copies

    @property
    def elements(self) -> int:
        return self.matrix_elements + self.vectors


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder. ``context``: tokens it was made for (0: not known), a table of them where
    ``learned_positions``. ``windowed`` layers cache only the last ``window`` tokens."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ffn: int
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    context: int = 0
    learned_positions: bool = False
    window: int = 0
    windowed: int = 0
    biases: Biases = Biases()
    latent: Latent = Latent()
    experts: Experts = Experts()

    @property
    def attention(self) -> str:
        """latent, multi-head, multi-query or grouped-query."""
        if self.latent.kv_rank:
            return "latent"
        if self.kv_heads == self.heads:
            return "multi-head"
        return "multi-query" if self.kv_heads == 1 else "grouped-query"

    @property
    def kv_elements(self) -> int:
        """Elements that one token leaves in the cache of one layer."""
        if self.latent.kv_rank:
            return self.latent.kv_rank + self.latent.rope
        return 2 * self.kv_heads * self.head_dim

    def kv_tokens(self, tokens: int) -> int:
        """Tokens cached in all layers together by a sequence of ``tokens``."""
        return (self.layers - self.windowed) * tokens + self.windowed * min(tokens, self.window)

    @property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        return sum(part.elements for part in self.parts())

    @property
    def activated(self) -> int:
        """Parameters that one token uses: its experts only, and one row of the embedding; a head in full."""
        return sum(part.used for part in self.parts())

    def by_group(self) -> dict[str, int]:
        """Parameters of each group of ``GROUPS`` that has any."""
        sizes = dict.fromkeys(GROUPS, 0)
        for part in self.parts():
            sizes[part.group] += part.elements
        return {group: count for group, count in sizes.items() if count}

    def parts(self) -> Iterator[Part]:
        """Every tensor, by the name that its module has in mptrain's own models."""
        table = self.vocabulary * self.hidden
        alias, used = ("head", table) if self.tied else ("", self.hidden)
        yield Part("embed", "embed", self.vocabulary, self.hidden, used=used, alias=alias)
        if self.learned_positions:
            yield Part("position", "embed", self.context, self.hidden, used=self.hidden)
        for layer in range(self.layers):
            yield from self._block(layer)
        yield self._norm("norm")
        if not self.tied:
            yield self._linear("head", "head", self.vocabulary, self.hidden)

    def _block(self, layer: int) -> Iterator[Part]:
        yield self._norm(f"blocks.{layer}.attention_norm")
        yield from self._latent(layer) if self.latent.kv_rank else self._attention(layer)
        yield self._norm(f"blocks.{layer}.mlp_norm")
        if self.experts.routed and layer >= self.experts.dense_layers:
            yield from self._experts(layer)
        else:
            yield from self._mlp(f"blocks.{layer}.mlp", "mlp", self.ffn)

    def _attention(self, layer: int) -> Iterator[Part]:
        name, width = f"blocks.{layer}.attention", self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        for letter, rows in (("q", width), ("k", keys), ("v", keys)):
            yield self._linear(f"{name}.{letter}", "attention", rows, self.hidden, bias=self.biases.qkv)
        if self.qk_norm:
            for letter in ("q", "k"):
                yield _vector(f"{name}.{letter}_norm", self.head_dim)
        yield self._linear(f"{name}.out", "attention", self.hidden, width, bias=self.biases.out)

    def _latent(self, layer: int) -> Iterator[Part]:
        name, sizes, bias = f"blocks.{layer}.attention", self.latent, self.biases.latent
        queries = self.heads * (sizes.nope + sizes.rope)
        if sizes.q_rank:
            yield self._linear(f"{name}.q_down", "attention", sizes.q_rank, self.hidden, bias=bias)
            yield _vector(f"{name}.q_norm", sizes.q_rank)
        yield self._linear(f"{name}.q", "attention", queries, sizes.q_rank or self.hidden)
        yield self._linear(f"{name}.kv_down", "attention", sizes.kv_rank + sizes.rope, self.hidden, bias=bias)
        yield _vector(f"{name}.kv_norm", sizes.kv_rank)
        yield self._linear(f"{name}.kv", "attention", self.heads * (sizes.nope + sizes.value), sizes.kv_rank)
        width = self.heads * sizes.value
        yield self._linear(f"{name}.out", "attention", self.hidden, width, bias=self.biases.out)

    def _experts(self, layer: int) -> Iterator[Part]:
        name, experts = f"blocks.{layer}.mlp", self.experts
        yield self._linear(f"{name}.router", "router", experts.routed, self.hidden)
        for what, rows, columns in _mlp_shapes(self.hidden, experts.ffn, self.gated):
            used = experts.active * rows * columns
            yield Part(f"{name}.experts.{what}", "experts", rows, columns, experts.routed, used=used)
        if experts.shared:
            yield from self._mlp(f"{name}.shared", "experts", experts.shared * experts.ffn)

    def _mlp(self, name: str, group: str, ffn: int) -> Iterator[Part]:
        for what, rows, columns in _mlp_shapes(self.hidden, ffn, self.gated):
            yield self._linear(f"{name}.{what}", group, rows, columns, bias=self.biases.mlp)

    def _norm(self, name: str) -> Part:
        return _vector(name, self.hidden * (1 + self.biases.norm))

    def _linear(self, name: str, group: str, rows: int, columns: int, *, bias: bool = False) -> Part:
        vectors = rows * bias
        return Part(name, group, rows, columns, vectors=vectors, used=rows * columns + vectors)


def _vector(name: str, size: int) -> Part:
    return Part(name, "norm", vectors=size, used=size)


def _mlp_shapes(hidden: int, ffn: int, gated: bool) -> list[tuple[str, int, int]]:
    gate = [("gate", ffn, hidden)] if gated else []
    return [*gate, ("up", ffn, hidden), ("down", hidden, ffn)]
