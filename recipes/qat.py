"""What quantization takes from the runs of a sweep, and what quantization-aware fine-tuning gives back, over seeds.

python recipes/qat.py SWEEP METHOD STEPS RATE OUT.json [GROUP_SIZE]    # SWEEP may be one run of a sweep

Beside each tuned model stands its control, the same steps without rounding: a model that was not trained to the end
gets better by any steps, and that is not what fine-tuning gives back. So the loss by quantization is counted from the
control, and so is what is left of it. `mptrain quantize RUN --to METHOD --finetune STEPS` does one run.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from mptrain.cli.quantize import TUNING_SEED
from mptrain.quantization import open_source, qat, quantize_model
from mptrain.quantization.evaluate import evaluate, loss_delta, top1_delta
from mptrain.quantization.matrix import SAMPLES, trained_at, validation_batches
from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.intervals import mean_of
from mptrain.report.deploy.matrix import Evaluation
from mptrain.tools import machine
from mptrain.tools.settings import to_plain

BATCHES = 160
UNSAID = ("sweep_dir", "logger", "baseline", "telemetry.record_every")  # what the losses do not depend on
ROWS = {  # what is compared with what: in FP32 as trained, or with the control
    "at once": "fp32",
    "control": "fp32",
    "control, quantized": "control",
    "tuned": "control",
}


def measured(folder: Path, method: str, steps: int, rate: float, group: int | None) -> dict[str, Evaluation]:
    """One run: the model as trained, quantized at once, tuned; the control, and it quantized."""
    source = open_source(folder)
    data, fp32 = source.dataset(), source.model
    size = SAMPLES[data.unit]
    held_out = validation_batches(data, BATCHES)

    def order() -> Any:
        return (data.batch(step, batch_size=size, seed=TUNING_SEED) for step in itertools.count())

    models = {name: copy.deepcopy(fp32) for name in ("fp32", "at once", "control", "tuned")}
    qat.train(models["control"], order(), steps, lr=rate)
    models["control, quantized"] = copy.deepcopy(models["control"])
    qat.finetune(models["tuned"], method, order(), steps, group_size=group, lr=rate)
    for name in ("at once", "control, quantized", "tuned"):
        quantize_model(models[name], method, group_size=group)
    return {name: evaluate(model, fp32, held_out, repeats=0) for name, model in models.items()}


def over(runs: list[dict[str, Evaluation]], name: str, other: str, *, hits: bool) -> Interval:
    """The difference of two of the models, over the runs; of a single one over its samples."""
    pairs = [(run[name], run[other]) for run in runs]
    if len(pairs) == 1:
        ours, theirs = pairs[0]
        return top1_delta(ours.hits, theirs.hits) if hits else loss_delta(ours.losses, theirs.losses)
    part = "hits" if hits else "losses"
    means = [[sum(getattr(e, part)) / len(getattr(e, part)) for e in pair] for pair in pairs]
    return mean_of([ours - theirs for ours, theirs in means], "paired t over seeds", seeds=True)


def half_back(runs: list[dict[str, Evaluation]]) -> Interval:
    """Half of what quantization takes of the control, less what is still lost after tuning, nats: above 0 if at least
    half came back."""
    columns = [[run[name].losses for name in ("control, quantized", "control", "tuned")] for run in runs]
    each = [
        [(lost - right) / 2 - (tuned - right) for lost, right, tuned in zip(*three, strict=True)] for three in columns
    ]
    if len(each) == 1:
        return mean_of(each[0], "paired t over samples")
    return mean_of([sum(values) / len(values) for values in each], "paired t over seeds", seeds=True)


def table(runs: list[dict[str, Evaluation]]) -> list[dict[str, Any]]:
    """A row for each of the models: its figures, means over the runs, and the change from the one beside it."""
    rows = []
    for name in ("fp32", *ROWS):
        found = [run[name] for run in runs]
        row: dict[str, Any] = {"name": name, "loss": sum(e.loss.mean for e in found) / len(found)}
        if found[0].hits:
            row["top1"] = sum(e.top1.mean for e in found if e.top1) / len(found)
        else:
            row["perplexity"] = math.exp(row["loss"])
        if name in ROWS:
            row |= {"beside": ROWS[name], "loss_delta": to_plain(over(runs, name, ROWS[name], hits=False))}
            if found[0].hits:
                row["top1_delta"] = to_plain(over(runs, name, ROWS[name], hits=True))
        rows.append(row)
    return rows


def main(sweep: Path, method: str, steps: int, rate: float, out: Path, group: int | None) -> None:
    trained = trained_at([sweep])  # FP32 first
    folders = [run.folder for run in trained if run.precision == trained[0].precision]
    runs = []
    for folder in folders:
        runs.append(measured(folder, method, steps, rate, group))
        print(folder.name, {name: round(found.loss.mean, 4) for name, found in runs[-1].items()}, flush=True)
    rows = table(runs)
    lost, left = (row["loss_delta"]["mean"] for row in rows[-2:])
    where = sweep if (sweep / "sweep.json").exists() else sweep.parent  # one run of a sweep will do
    plan = json.loads((where / "sweep.json").read_text())
    given = {word.partition("=")[0]: word for word in plan["overrides"]}  # of one given twice the last counts
    words = [word for key, word in given.items() if key not in UNSAID]
    kept = {
        "command": " ".join(["python train.py -m", *words]),
        "method": method,
        "group_size": group,
        "steps": steps,
        "rate": rate,
        "seeds": len(runs),
        "samples": runs[0]["fp32"].samples,
        "machine": machine.describe(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "rows": rows,
        "recovered_frac": 1 - left / lost,
        "half_back_nats": to_plain(half_back(runs)),
    }
    out.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps({key: kept[key] for key in ("recovered_frac", "half_back_nats")}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) not in (6, 7):
        sys.exit(__doc__)
    sweep, method, steps, rate, out, *group = sys.argv[1:]
    main(Path(sweep), method, int(steps), float(rate), Path(out), int(group[0]) if group else None)
