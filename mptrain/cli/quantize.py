"""``mptrain quantize``: A trained model, or a Hugging Face one, in INT8, INT4 or FP8"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch import Tensor

from mptrain.cli.arguments import command_parser
from mptrain.quantization import artifact, qat
from mptrain.quantization.apply import quantize_model
from mptrain.quantization.judging import BATCHES, Judge
from mptrain.quantization.matrix import SAMPLES
from mptrain.quantization.methods import METHODS, Method, named
from mptrain.quantization.report import Layer, Report, reasons
from mptrain.quantization.source import Source, open_source
from mptrain.report.tables import table_of
from mptrain.tools import machine
from mptrain.tools.files import json_text, require_free, write_whole
from mptrain.tools.settings import require, to_plain

SHOWN = 12
"""Rows of the table without --all."""
TUNING_SEED = 1 << 20
"""Of the order of fine-tuning's samples: that of no run."""
CALIBRATION_ROWS = 8
"""Samples of a batch that a calibrated method sees."""


def run(argv: list[str]) -> int:
    """Quantize, verify, write. ValueError, naming the option to change, if any of it fails."""
    args = _parser().parse_args(argv)
    method = named(args.to)
    if method.name == "fp32":
        raise ValueError("--to fp32 quantizes nothing: name another method, or use mptrain export")
    require(args.calibrate > 0, "--calibrate", args.calibrate, "at least one batch, e.g. 4")
    require(args.evaluate is None or args.evaluate >= 0, "--evaluate", args.evaluate, "0 or more")
    require(args.finetune >= 0, "--finetune", args.finetune, "0 or more")
    device = machine.pick_device(args.device)
    why = method.missing(device)
    if why:
        raise ValueError(why)
    source = open_source(args.source, args.average)
    out = args.out or source.out.with_name(f"{source.out.name}-{method.name}")
    require_free(out)
    batches = list(_calibration(source, method, args.calibrate)) if method.calibrated else []
    source.model.to(device)
    judge = _judge(source, args)
    if args.finetune:
        judge.at_once(method, args.group_size, args.keep)
        _finetune(source, method, args)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    report = quantize_model(source.model, method, group_size=args.group_size, keep=args.keep, batches=batches)
    artifact.save(out, source, report)
    judge.add(f"{method.name} after {args.finetune} steps" if args.finetune else method.name, source.model, report)
    print_report(Console(), source, report, args.all)
    judge.show(Console())
    print(f"{out}: {artifact.size_bytes(out):,} bytes; mptrain.quantization.load({str(out)!r}) is the model")
    if args.json:
        write_whole(args.json, json_text(_plain(report, source, out, judge), indent=1) + "\n")
    return 0


def _judge(source: Source, args: argparse.Namespace) -> Judge:
    """Build the judge from the run's validation data; without ``--evaluate``, missing data is not an error."""
    if args.evaluate is not None:
        return Judge(source, args.evaluate)
    try:
        return Judge(source, BATCHES)
    except (ValueError, OSError) as error:
        if args.finetune:
            raise
        print(f"not evaluated: {error}")
        return Judge(source, 0)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    what = "a run's folder, a checkpoint in one, a Hugging Face model's folder, or a .safetensors file in one"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    words = "; ".join(f"{name}: {method.what}" for name, method in METHODS.items() if name != "fp32")
    parser.add_argument("--to", required=True, metavar="METHOD", help=words)
    parser.add_argument("--group-size", type=int, metavar="N", help="numbers that share a scale (INT4: 128)")
    parser.add_argument("--keep", default="", metavar="REGEX", help="layers left as they are (full match)")
    parser.add_argument("--average", action="store_true", help="the running average of a run's weights")
    parser.add_argument("--calibrate", type=int, default=4, metavar="N", help="batches of a run's data to see")
    what = f"batches of a run's validation data to evaluate on (default: {BATCHES}; 0: not at all)"
    parser.add_argument("--evaluate", type=int, metavar="N", help=what)
    what = "steps of fine-tuning with rounded weights before quantizing (INT4, INT2)"
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS", help=what)
    parser.add_argument("--finetune-lr", type=float, default=qat.RATE, metavar="LR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="OUT", help="the folder to create (default: next to the model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures of every layer")
    parser.add_argument("--all", action="store_true", help=f"every layer, not only the worst {SHOWN}")
    return parser


def _finetune(source: Source, method: Method, args: argparse.Namespace) -> None:
    """Fine-tune on the run's training data, in an order of its own."""
    data = source.dataset()
    size = SAMPLES[data.unit]
    batches = (data.batch(step, batch_size=size, seed=TUNING_SEED) for step in itertools.count())
    tuned = qat.finetune(
        source.model,
        method,
        batches,
        args.finetune,
        group_size=args.group_size,
        keep=args.keep,
        lr=args.finetune_lr,
    )
    tenth = max(1, len(tuned.losses) // 10)
    begin, end = statistics.fmean(tuned.losses[:tenth]), statistics.fmean(tuned.losses[-tenth:])
    print(f"fine-tuned {len(tuned.layers)} rounded layers for {args.finetune} steps: loss {begin:.4f} to {end:.4f}")


def _calibration(source: Source, method: Method, batches: int) -> Iterator[dict[str, Tensor]]:
    """Yield training samples of a run: validation data must not set the scales that it judges."""
    if source.data is None:
        raise ValueError(
            f"{method.name} must see activations and {source.description} has no data: use --to int8-dynamic, "
            "or quantize_model(model, method, batches=...)"
        )
    data = source.dataset()
    for step in range(batches):
        yield data.batch(step, batch_size=CALIBRATION_ROWS, seed=0)


def print_report(console: Console, source: Source, report: Report, every: bool) -> None:
    """Print the quantized layers worst first, the others with the reason, and the totals."""
    worst = sorted(report.quantized, key=lambda layer: -math.inf if layer.sqnr_db is None else layer.sqnr_db)
    shown = worst if every else worst[:SHOWN]
    groups = f", groups of {report.group_size}" if report.group_size else ""
    console.print(f"{source.description}: {report.method}{groups}", highlight=False, soft_wrap=True)
    figures = ("weights", "bytes", "of FP32", "SQNR dB")
    table = table_of(["layer, worst first", "format"], figures, padding=(0, 1), folded=True)
    for layer in shown:
        table.add_row(*_cells(layer))
    console.print(table)
    if len(shown) < len(worst):
        console.print(f"{len(worst) - len(shown)} more layers; use --all", highlight=False)
    if report.kept:
        unquantized_bytes = sum(layer.bytes for layer in report.kept)
        why = reasons({layer.name: layer.kept for layer in report.kept})
        console.print(f"kept, {unquantized_bytes:,} bytes: {why}", highlight=False, soft_wrap=True, markup=False)
    share = f"{len(report.quantized)} layers are {100 * report.quantized_frac:.2f} % of their FP32 bytes"
    whole = f"the model {report.bytes:,} of {report.bytes_fp32:,} bytes ({100 * report.frac:.1f} %)"
    console.print(f"{share}; {whole}", highlight=False, soft_wrap=True)


def _cells(layer: Layer) -> tuple[str, ...]:
    error = "exact" if layer.sqnr_db == math.inf else f"{layer.sqnr_db:.1f}"
    share = f"{100 * layer.bytes / layer.bytes_fp32:.2f} %"
    return layer.name, layer.format, f"{layer.elements:,}", f"{layer.bytes:,}", share, error


def _plain(report: Report, source: Source, out: Path, judge: Judge) -> dict[str, object]:
    totals = {
        "source": source.description,
        "out": str(out),
        "file_bytes": artifact.size_bytes(out),
        "bytes": report.bytes,
        "bytes_fp32": report.bytes_fp32,
        "quantized_frac": report.quantized_frac,
        "evaluations": to_plain(judge.evaluations),
    }
    return asdict(report) | totals
