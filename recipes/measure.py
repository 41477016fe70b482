"""Run the sweep of the README and keep what it found; make the tables of both READMEs from what is kept.

python recipes/measure.py runs       # 12 runs of 200 steps, then the tables
python recipes/measure.py tables     # the tables alone
"""

from __future__ import annotations

import datetime
import json
import math
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
    """Markdown of ``mptrain bench plan --json``: how many cells are met, and of each precision the furthest off."""
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


def tuned_table(kept: dict[str, Any]) -> str:
    """Markdown of ``recipes/qat.py``: what quantization takes, what tuning gives back, from models trained alike."""
    images = "top1" in kept["rows"][0]
    metric = "top-1" if images else "perplexity"
    lines = [f"| model | {metric} | loss (nats) | beside | Δ loss (95 %) | Δ {metric} |", "|---|---|---|---|---|---|"]
    names = {"fp32": "FP32", "at once": "quantized at once", "control": f"FP32, {kept['steps']} steps more"}
    names |= {
        "control, quantized": f"that, {kept['method']}",
        "tuned": f"tuned for {kept['steps']} steps, {kept['method']}",
    }
    for row in kept["rows"]:
        figure = f"{row['top1']:.2%}" if images else f"{row['perplexity']:.3f}"
        cells = [names[row["name"]], figure, f"{row['loss']:.4f}"]
        if "beside" in row:
            delta = row["loss_delta"]
            other = f"{row['top1_delta']['mean'] * 100:+.2f} pt" if images else f"{math.expm1(delta['mean']):+.2%}"
            ends = f"{delta['mean']:+.4f} [{delta['low']:+.4f}, {delta['high']:+.4f}]"
            cells += [names[row["beside"]], ends, other]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    half, lost = kept["half_back_nats"], kept["rows"][-2]["loss_delta"]
    back = f"{kept['method'].upper()} takes too little to measure here, so there is nothing to give back."
    if lost["low"] > 0:
        surely = "more than half, surely" if half["low"] > 0 else "not surely half"
        ends = f"{half['mean']:+.4f} [{half['low']:+.4f}, {half['high']:+.4f}] nats more than half of it"
        back = f"Fine-tuning gives back {kept['recovered_frac']:.0%} of what {kept['method'].upper()} takes"
        back += f" ({surely}: {ends})."
    group = f", groups of {kept['group_size']}" if kept["group_size"] else ""
    where = f"`{kept['command']}`, then {kept['method']}{group}, {kept['steps']} steps at {kept['rate']:g}; "
    where += f"{kept['seeds']} seed{'s' * (kept['seeds'] > 1)}, {kept['samples']} validation samples; {kept['machine']}"
    ending = f"torch {kept['versions']['torch']}, {kept['date']}."
    return "\n".join(lines) + f"\n\n{back} {where}, {ending}"


def deployed_table(kept: dict[str, Any]) -> str:
    """Markdown of a ``deploy.json``: trained in, down; deployed in, across; the change from the same run in FP32."""
    formats = list(dict.fromkeys(cell["deployed"] for cell in kept["cells"]))
    lines = [f"| trained in | {' | '.join(formats)} |", "|---|" + "---|" * len(formats)]
    for name in dict.fromkeys(cell["trained"] for cell in kept["cells"]):
        row = {cell["deployed"]: cell for cell in kept["cells"] if cell["trained"] == name}
        lines.append("| " + " | ".join((name, *(_deployed(row[other], kept["metric"]) for other in formats))) + " |")
    some = [cell for cell in kept["cells"] if cell["trained"] == kept["cells"][0]["trained"]]
    sizes = ", ".join(f"{cell['deployed']} {cell['size_frac']:.1%}" for cell in some if cell["size_frac"])
    runs = max(cell["runs"] for cell in kept["cells"])
    over = f"{runs} seeds of {kept['samples']}" if runs > 1 else str(kept["samples"])
    said = (
        f"{kept['metric'].capitalize()}, and its change from the same run in FP32 with its 95 % interval, over {over} "
    )
    said += f"validation samples. Of the FP32 file: {sizes}."
    return "\n".join(lines) + f"\n\n{said} {kept['machine']}."


def _deployed(cell: dict[str, Any], metric: str) -> str:
    if cell["metric"] is None:
        return "-"
    value, delta = cell["metric"]["mean"], cell["own_delta"]
    text = f"{value:.3f}" if metric == "perplexity" else f"{value:.2%}"
    if delta is None:
        return text
    ends = [f"{100 * delta[key]:+.2f}" for key in ("mean", "low", "high")]
    return f"{text} ({ends[0]} {'%' if metric == 'perplexity' else 'pt'} [{ends[1]}, {ends[2]}])"


TABLES = {"gpt-nano-cpu.json": precisions_table}
TABLES |= dict.fromkeys(("deploy-digits.json", "deploy-gpt-nano.json"), deployed_table)
TABLES |= dict.fromkeys(("qat-digits-int2.json", "qat-digits-int4.json", "qat-gpt-nano-int4.json"), tuned_table)
TABLES |= dict.fromkeys(("bench-cpu.json", "bench-telemetry.json", "bench-dist.json"), bench_table)
TABLES |= {"bench-plan.json": plan_table}


def with_tables(text: str) -> str:
    """``text`` with what stands between each ``<!-- results: FILE -->`` and the next heading or mark made anew."""
    for name, make in TABLES.items():
        path = RESULTS / name
        if not path.exists():  # not measured yet
            continue
        mark = re.escape(f"<!-- results: recipes/results/{name} -->")
        table = make(json.loads(path.read_text()))
        text = re.sub(
            rf"({mark}\n).*?(?=\n\n(?:#|<!-- results))",
            lambda found, table=table: found[1] + table,
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["runs"]:
        run()
    elif sys.argv[1:] != ["tables"]:
        sys.exit(__doc__)
    for readme in (ROOT / "README.md", ROOT / "recipes" / "README.md"):
        readme.write_text(with_tables(readme.read_text()))
