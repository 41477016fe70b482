"""``mptrain``: what there is to know and measure beside training (``python train.py`` trains)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mptrain import baseline, build, kernels, machine
from mptrain.backends.base import MODULES, load
from mptrain.config import RunConfig, clear_errors, composed
from mptrain.doctor import audited_step
from mptrain.formats import Format
from mptrain.policy import PrecisionPolicy, conf_dir
from mptrain.report.audit import print_audit
from mptrain.settings import did_you_mean, from_plain

Command = Callable[[list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit code 2 and a clear message for what the user can mend."""
    words = sys.argv[1:] if argv is None else argv
    with clear_errors():
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}{did_you_mean(words[0], [*COMMANDS])}")
        return COMMANDS[words[0]](words[1:])


def usage() -> str:
    shown = [(name, (command.__doc__ or "").splitlines()[0]) for name, command in COMMANDS.items() if name != "probe"]
    lines = [f"  {name:10}{text}" for name, text in shown]
    return "usage: mptrain COMMAND [...]\n\n" + "\n".join(lines) + "\n\nTo train: python train.py --help"


def doctor(argv: list[str]) -> int:
    """Which backends this machine has; with ``--audit precision=fp8 ...``: what every GEMM of a step runs in."""
    if argv[:1] == ["--audit"]:
        return _audit(argv[1:])
    _no_arguments("doctor", argv)
    device = machine.pick_device("auto")
    console = Console()
    console.print(f"{machine.describe(device)}, torch {torch.__version__}", highlight=False)
    for path in sorted((conf_dir() / "precision").glob("*.yaml")):
        policy = PrecisionPolicy.named(path.stem)
        table = Table(title=f"precision={policy.name}", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        chosen = False
        for name in MODULES:
            why = load(name).missing(policy, device, auto=True)
            first, chosen = why is None and not chosen, chosen or why is None
            table.add_row(name, "used" if first else why or "available")
        console.print(table)
    console.print(f"quantizer on {device}: {kernels.implementation(device)}", highlight=False)
    for name, why in kernels.why_not().items():
        console.print(f"  {name}: {why or 'available'}", highlight=False)
    return 0


def _audit(overrides: list[str]) -> int:
    """Exit code 1 if less than audit.min_coverage ran in what the policy asks (claims of a backend count)."""
    config = composed(overrides)
    audit, said = audited_step(config)
    console = Console()
    console.print(said, highlight=False, soft_wrap=True)
    print_audit(console, audit)
    console.print("attention's share grows with the length of the sequences", highlight=False)
    try:
        audit.require(config.audit.min_coverage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def formats(argv: list[str]) -> int:
    """The number formats: bits, largest and smallest magnitudes, spacing at 1."""
    _no_arguments("formats", argv)
    table = Table("format", "bits", "mantissa bits", "max", "min normal", "min subnormal", "eps", "Inf")
    for fmt in Format:
        spec = fmt.value
        numbers = [f"{number:.6g}" for number in (spec.max, spec.min_normal, spec.min_subnormal, spec.eps)]
        table.add_row(
            str(fmt),
            *(str(n) for n in (spec.bits, spec.mantissa_bits)),
            *numbers,
            "yes" if spec.has_inf else "no",
        )
    Console().print(table)
    return 0


def bench(argv: list[str]) -> int:
    """``bench cpu`` or ``bench gpu``: speed against targets, peers and limits (``--help`` after either)."""
    if argv[:1] == ["cpu"]:
        from mptrain.bench import cpu

        return cpu.run(argv[1:])
    if argv[:1] == ["gpu"]:
        from mptrain.bench import gpu

        return gpu.run(argv[1:])
    raise ValueError("bench needs a device: mptrain bench cpu, or mptrain bench gpu")


def probe(argv: list[str]) -> int:
    """The FP32 probe of a run, started by it: settings (JSON file) in, figures (JSON file) out."""
    asked, answer = argv
    config = from_plain(RunConfig, json.loads(Path(asked).read_text()), "config")
    Path(answer).write_text(baseline.figures_json(build.probe(config)))
    return 0


def _no_arguments(command: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"mptrain {command}", description=COMMANDS[command].__doc__)
    parser.parse_args(argv)


COMMANDS: dict[str, Command] = {"doctor": doctor, "formats": formats, "bench": bench, "probe": probe}

if __name__ == "__main__":
    sys.exit(main())
