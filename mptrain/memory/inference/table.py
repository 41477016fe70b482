"""A plan of inference, and the catalogue, for the terminal. Columns that do not fit are left out, which is said."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.memory.gpus import Gpu
from mptrain.memory.inference.catalogue import Model
from mptrain.memory.inference.plan import kv_bytes
from mptrain.memory.inference.serving import Row, Subject, Target
from mptrain.memory.inference.weights import weight_format
from mptrain.memory.units import gib, in_gb, in_gib

GAP = 2
SCALES = "of which\nscales"
DROPPED = ("bytes", SCALES, "overhead", "per GPU", "source", "KV B/token", "attention", "of a token")  # in this order
Columns = dict[str, list[str]]


def print_plan(console: Console, subject: Subject, target: Target, rows: list[Row]) -> None:
    """Print the model, a row a format, and what the figures rest on."""
    for line in _heading(subject, rows):
        console.print(Text(line, "bold" if line.startswith(subject.name) else ""))
    print_columns(console, _columns(target, rows))
    _print_article(console, rows)
    for line in _notes(subject, target, rows):
        console.print(Text(line))


def print_catalogue(console: Console, models: list[Model], gpus: list[Gpu]) -> None:
    architectures = [one.architecture for one in models]
    print_columns(
        console,
        {
            "--model": [one.name for one in models],
            "parameters": [f"{one.parameters:,}" for one in architectures],
            "of a token": [f"{one.activated:,}" for one in architectures],
            "attention": [one.attention for one in architectures],
            "KV B/token": [f"{kv_bytes(one, 1, 'bf16'):,}" for one in architectures],
            "source": [one.source for one in models],
        },
    )
    print_columns(
        console,
        {
            "--gpu": [one.name for one in gpus],
            "memory": [one.stated for one in gpus],
            "GiB": [in_gib(one.memory) for one in gpus],
            "source": [one.source for one in gpus],
        },
    )
    console.print(Text("KV B/token: bytes that a token leaves in a BF16 cache"))
    console.print(Text("memory: the vendors' GB, 10^9 bytes; drivers report 0.6 to 7.4 % more"))


def print_columns(console: Console, columns: Columns) -> None:
    """A table of those that fit; the first and the last are always there."""
    shown = dict(columns)
    for name in (*DROPPED, *[*columns][1:-1]):
        if sum(_width(head, cells) for head, cells in shown.items()) <= console.width:
            break
        shown.pop(name, None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for name, cells in shown.items():
        numbers = all(cell[:1].isdigit() or cell in ("-", "none") for cell in cells)
        table.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, row))
    console.print(table)
    missing = [name for name in columns if name not in shown]
    if missing:
        said = ", ".join(missing).replace("\n", " ")
        console.print(Text(f"left out at this width: {said} (--json has all)", "dim"))


def _width(head: str, cells: list[str]) -> int:
    """Characters of a column with the gap after it."""
    return GAP + max(map(cell_len, [*head.split("\n"), *cells]))


def _heading(subject: Subject, rows: list[Row]) -> list[str]:
    model, request = subject.architecture, rows[0].plan.request
    if model is None:
        return [f"{subject.name}; memory in GiB (2^30 bytes)"]
    used = f", {model.activated:,} used by a token" if model.experts.routed else ""
    cached = f"{model.attention} attention, {model.kv_elements:,} elements cached a token and layer"
    return [
        f"{subject.name}: {model.parameters:,} parameters{used}",
        f"{model.layers} layers, {cached}",
        f"batch {request.batch:,} x ({request.input_tokens:,} + {request.output_tokens:,}) tokens = "
        f"{request.batch * request.tokens:,} tokens; memory in GiB (2^30 bytes)",
    ]


def _columns(target: Target, rows: list[Row]) -> Columns:
    plans = [row.plan for row in rows]
    columns: Columns = {"format": [plan.format for plan in plans]}
    columns["weights"] = [in_gib(plan.weights.total) for plan in plans]
    columns[SCALES] = [in_gib(plan.weights.scales) if plan.weights.scales else "-" for plan in plans]
    for role, head in (("kv_cache", "KV cache"), ("activations", "activations"), ("overhead", "overhead")):
        if role in plans[0].roles:
            columns[head] = [in_gib(plan.roles[role]) for plan in plans]
    columns["total"] = [in_gib(plan.total) for plan in plans]
    columns["bytes"] = [f"{plan.total:,}" for plan in plans]
    if target.memory:
        columns["GPUs"] = [str(row.gpus) if row.gpus else "none" for row in rows]
        columns["per GPU"] = [in_gib(row.per_gpu) if row.gpus else "-" for row in rows]
        if plans[0].heads:
            columns["largest\nbatch"] = [f"{row.largest:,}" if row.gpus or target.gpus else "-" for row in rows]
    return columns


def _print_article(console: Console, rows: list[Row]) -> None:
    """The article's sums, in its units, and what is to be known about them."""
    articles = [(row.plan, row.article) for row in rows if row.article]
    if not articles:
        return
    console.print(Text("by the planning article's convention", "bold"))
    columns: Columns = {"format": [plan.format for plan, _ in articles]}
    columns["weights\nGB"] = [in_gb(one.weights) for _, one in articles]
    if any(one.activated for _, one in articles):
        columns["activated\nGB"] = [in_gb(one.activated) for _, one in articles]
    columns["KV cache\nGiB"] = [in_gib(one.kv_cache) for _, one in articles]
    columns['sum, its\n"GB"'] = [f"{one.total:,.2f}" for _, one in articles]
    columns["in one\nunit, GB"] = [in_gb(one.bytes) for _, one in articles]
    columns["the same\nin GiB"] = [in_gib(one.bytes) for _, one in articles]
    print_columns(console, columns)
    notes = ["the article adds GB (10^9) and GiB (2^30) as one unit"]
    if articles[0][1].activated:
        notes.append("the activated parameters are among the weights already")
    plan, one = articles[0]
    if (own := plan.roles["kv_cache"]) != one.kv_cache:
        less = f"{one.kv_cache / own:.1f}x less"
        notes.append(
            f"its cache is as wide as the model; what this model caches is {gib(own)} in {plan.format}, {less}"
        )
    console.print(Text("; ".join(notes)))


def _notes(subject: Subject, target: Target, rows: list[Row]) -> list[str]:
    request, notes = rows[0].plan.request, []
    for row in rows:
        fmt, kept = weight_format(row.plan.format, request.group_size), row.plan.weights.kept_layers
        if fmt.quantized:
            beside = (
                f"; in {request.keep_format}: {', '.join([*kept, 'norms', 'biases'])}" if subject.architecture else ""
            )
            notes.append(f"{fmt.described}{beside}")
    if target.memory:
        notes.append(_target_note(target, rows))
    if subject.architecture is None:
        notes.append(f"no KV cache or activations: these need --model. Assumed: --overhead {gib(request.overhead)}")
        return notes
    kv = ", ".join(dict.fromkeys(row.plan.kv_format for row in rows))
    notes.append(
        f"KV cache in {kv} (--kv-format). Assumed: --overhead {gib(request.overhead)} a GPU, --prefill "
        f"{request.prefill:,} tokens in a pass, fused kernels, logits of last tokens only"
    )
    context = subject.architecture.context
    if context and request.tokens > context:
        notes.append(f"{request.tokens:,} tokens are more than the {context:,} that {subject.name} was made for")
    if subject.source:
        notes.append(f"figures: {subject.source}")
    return notes


def _target_note(target: Target, rows: list[Row]) -> str:
    plan = rows[0].plan
    note = f"{target.name}: {gib(target.memory)} each, by tensor parallelism"
    if plan.heads:
        whole = "activations" if plan.kv_heads else "activations and the latents"
        note += f" (a divisor of {plan.heads} heads; {whole} whole on each)"
    other = [f"{row.plan.format} {row.by_bytes}" for row in rows if row.by_bytes and row.by_bytes != row.gpus]
    if other and not target.gpus:
        note += f"; the bytes alone: {', '.join(other)}"
    if target.gpus and plan.heads and plan.heads % target.gpus:
        note += f"; {target.gpus} does not divide them"
    return note
