"""Run a recipe's model in every precision and keep the results; make README's tables from what is kept.

python recipes/measure.py runs       # six runs of 300 steps, then the tables
python recipes/measure.py tables     # the tables alone
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes" / "results"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed")
COMMAND = "python train.py precision=P model=gpt-nano trainer.max_steps=300"


def run() -> None:
    """The six runs, FP32 first, as ``gpt-nano-cpu.json``."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [one(name, Path(folder)) for name in PRECISIONS]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    kept = {
        "command": COMMAND,
        "machine": rows[0]["machine"],
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "rows": rows,
    }
    (RESULTS / "gpt-nano-cpu.json").write_text(json.dumps(kept, indent=2) + "\n")


def one(name: str, folder: Path) -> dict[str, Any]:
    """Train one precision beside the FP32 run in ``folder``; its summary without paths."""
    words = COMMAND.replace("=P", f"={name}").split()[1:]
    given = [*words, f"run_dir={folder / name}", f"runs_dir={folder}", "logger=jsonl"]
    subprocess.run([sys.executable, *given], cwd=ROOT, check=True)
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    summary["baseline"]["source"] = summary["baseline"]["source"].replace(f"{folder}/", "")
    return summary


def precisions_table(kept: dict[str, Any]) -> str:
    """Markdown: loss against FP32, speed and memory ratios, overflow, underflow and skipped steps."""
    fp32 = kept["rows"][0]
    lines = [
        "| precision | backend | validation loss | vs FP32 | speed | memory | overflow | underflow | skipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in kept["rows"]:
        base, change = row["baseline"], row["val_loss"] / fp32["val_loss"] - 1
        speed = "emulated" if row["emulated"] else "1" if row is fp32 else f"{base['speedup']:.2f}x"
        memory = "1" if row is fp32 else f"{base['memory_ratio']:.2f}x"
        counted = row["overflow_events"] is not None
        events = (str(row["overflow_events"]), f"{row['underflow_frac']:.3%}") if counted else ("-", "-")
        cells = (row["precision"], row["backend"], f"{row['val_loss']:.4f}", f"{change:+.2%}", speed, memory, *events)
        lines.append("| " + " | ".join((*cells, str(row["skipped_steps"]))) + " |")
    where = f"`{kept['command']}` on {kept['machine']}, torch {kept['versions']['torch']}, {kept['date']}"
    return "\n".join(lines) + f"\n\n{where}. Speed and memory are ratios to FP32."


def bench_table(kept: dict[str, Any]) -> str:
    """Markdown of ``mptrain bench cpu --json`` and of its siblings."""
    lines = ["| measured | figure | target | A/A twin |  |", "|---|---|---|---|---|"]
    for row in kept["rows"]:
        unit = "x" if row["unit"] == "x" else f" {row['unit']}"
        target = (
            "" if row["target"] is None else f"{'at most' if row['at_most'] else 'at least'} {row['target']:g}{unit}"
        )
        figure, twin = (f"{row[key]:.3g}{unit}" if row[key] is not None else "" for key in ("measured", "noise"))
        lines.append(f"| {row['name']} | {figure} | {target} | {twin} | {row['verdict']} |")
    about = kept["machine"]
    where = f"`{about['command']}` on {about['cpu']} ({about['isa']}), torch {about['torch']}, {about['date'][:10]}"
    return (
        "\n".join(lines) + f"\n\n{where}. An A/A twin is the reference measured twice: 1x or 0 us on a quiet machine."
    )


TABLES = {"gpt-nano-cpu.json": precisions_table, "bench-cpu.json": bench_table, "bench-telemetry.json": bench_table}


def with_tables(text: str) -> str:
    """``text`` with what stands between each ``<!-- results: FILE -->`` and the next heading made anew."""
    for name, make in TABLES.items():
        path = RESULTS / name
        mark = re.escape(f"<!-- results: recipes/results/{name} -->")
        table = make(json.loads(path.read_text()))
        text = re.sub(rf"({mark}\n).*?(?=\n\n#)", lambda found, table=table: found[1] + table, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["runs"]:
        run()
    elif sys.argv[1:] != ["tables"]:
        sys.exit(__doc__)
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
