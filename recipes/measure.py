"""Run the sweep of the README and keep what it found; make README's tables from what is kept.

python recipes/measure.py runs       # 12 runs of 200 steps, then the tables
python recipes/measure.py tables     # the tables alone
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes" / "results"
COMMAND = "python train.py -m ablation=precisions"


def run() -> None:
    """The sweep, as ``gpt-nano-cpu.json``: its report without curves and events."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "sweep"
        begin = time.monotonic()
        given = [*COMMAND.split()[1:], f"sweep_dir={sweep}", "logger=jsonl"]
        subprocess.run([sys.executable, *given], cwd=ROOT, check=True)
        minutes = (time.monotonic() - begin) / 60
        report = json.loads((sweep / "report.json").read_text())
        about = json.loads(next(sweep.glob("*/run.json")).read_text())
    (group,) = report["groups"]
    kept = {
        "command": COMMAND,
        "minutes": round(minutes, 1),
        "machine": about["machine"],
        "date": datetime.date.today().isoformat(),
        "commit": about["commit"],
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "task": group["task"],
        "rules": report["rules"],
        "rows": [kept_of(variant) for variant in group["variants"]],
    }
    (RESULTS / "gpt-nano-cpu.json").write_text(json.dumps(kept, indent=2) + "\n")


def kept_of(variant: dict[str, Any]) -> dict[str, Any]:
    """One variant's figures; of its runs the losses by seed."""
    health = {key: variant["health"][key] for key in ("overflow_events", "underflow_frac", "skipped_steps", "coverage")}
    runs = [{key: row[key] for key in ("seed", "steps", "val_loss", "tokens_per_s")} for row in variant["runs"]]
    same = {key: variant[key] for key in ("label", "backend", "emulated", "verdict", "loss", "speed", "memory")}
    return {**same, "health": health, "runs": runs}


def precisions_table(kept: dict[str, Any]) -> str:
    """Markdown: the verdict, loss against FP32, speed and memory ratios, overflow, underflow and skipped steps."""
    lines = [
        "| precision | verdict | validation loss | vs FP32 (95 %) | speed | memory | overflow | underflow | skipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in kept["rows"]:
        delta, speed, health = row["loss"]["val_delta"], row["speed"], row["health"]
        change = "-" if delta is None else f"{delta['mean']:+.2%} [{delta['low']:+.2%}, {delta['high']:+.2%}]"
        ratio = "emulated" if row["emulated"] else f"{speed['ratio']:.2f}x"
        counted = health["overflow_events"] is not None
        events = (f"{health['overflow_events']:,}", f"{health['underflow_frac']:.3%}") if counted else ("-", "-")
        cells = (row["label"], row["verdict"]["text"], f"{row['loss']['val']:.4f}", change, ratio)
        memory = f"{row['memory']['ratio']:.2f}x"
        lines.append("| " + " | ".join((*cells, memory, *events, str(health["skipped_steps"]))) + " |")
    where = f"`{kept['command']}` ({kept['task']}; 3 seeds; {kept['minutes']:g} minutes) on {kept['machine']}"
    ending = f"torch {kept['versions']['torch']}, {kept['date']}. Speed and memory are ratios to FP32."
    return "\n".join(lines) + f"\n\n{where}, {ending}"


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


def plan_table(kept: dict[str, Any]) -> str:
    """Markdown of ``mptrain bench plan --json``: of each precision the cell that is furthest off, and how many are met."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in kept["rows"]:
        rows.setdefault(row["name"].split(", ")[1], []).append(row)
    lines = ["| precision | cells | within the bound | furthest apart | of |", "|---|---|---|---|---|"]
    for name, cells in rows.items():
        worst = max(cells, key=lambda row: row["measured"])
        met = sum(row["verdict"] == "met" for row in cells)
        bound = f"{met} of {len(cells)} (at most {worst['target']:g} %)"
        peak = f"{worst['name']}, {worst['peak_mib']:.1f} MiB"
        lines.append(f"| {name} | {len(cells)} | {bound} | {worst['measured']:.2g} % | {peak} |")
    about = kept["machine"]
    where = f"`{about['command']}` on {about['cpu']} ({about['isa']}), torch {about['torch']}, {about['date'][:10]}"
    said = "{gpt, llama} x {activations kept, checkpointing} x {AdamW, 8-bit moments}; planned against measured peak"
    return "\n".join(lines) + f"\n\n{where}: {said}."


TABLES = {"gpt-nano-cpu.json": precisions_table}
TABLES |= dict.fromkeys(("bench-cpu.json", "bench-telemetry.json", "bench-dist.json"), bench_table)
TABLES |= {"bench-plan.json": plan_table}


def with_tables(text: str) -> str:
    """``text`` with what stands between each ``<!-- results: FILE -->`` and the next heading made anew."""
    for name, make in TABLES.items():
        path = RESULTS / name
        if not path.exists():  # not measured yet
            continue
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
