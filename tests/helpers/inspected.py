"""A recorded run, and ``mptrain inspect`` on it."""

import math

import pytest
import torch

from mptrain import cli
from mptrain.formats import Format, overflows, round_to, underflows
from mptrain.telemetry import record
from mptrain.telemetry.histogram import Histogram

SCALES = {"input": 32.0, "weight": 448.0, "grad_output": 3e6, "update": 1.0}
FORMATS = {"input": "fp8_e4m3", "weight": "fp8_e4m3", "grad_output": "fp8_e5m2", "update": ""}
SIZES = {"input": 1.0, "weight": 0.02, "grad_output": 1e-4, "update": 1e-5}
LOST = [4096.0, 1024.0, 0.0, 512.25, 3.0]


def tensor_of(layer, role, step):
    generator = torch.Generator().manual_seed(step + 7 * layer + 100 * len(role))
    x = torch.randn(4096, generator=generator) * torch.exp(torch.randn(4096, generator=generator)) * SIZES[role]
    x[: 64 * layer] = 0
    if (layer, role) == (1, "grad_output"):
        x[100], x[101] = math.inf, math.nan
    return x


def recorded(step, layers=3, without=()):
    rows, tables = [], {name: [] for name in ("histogram", "counts", "scale", "amax", "errors", "blocks", "lost")}
    for layer in range(layers):
        for role, fmt in FORMATS.items():
            x = tensor_of(layer, role, step)
            rows.append((f"blocks.{layer}.mlp", role, fmt))
            finite = x[x.isfinite()].double()
            kept = round_to(finite * SCALES[role], Format[fmt]) / SCALES[role] if fmt else finite
            fields = [x.abs().reshape(-1, size).amax(1).view(torch.int32) >> 23 for size in (32, 128)]
            tables["histogram"].append(Histogram.of(x).counts)
            tables["counts"].append(count_cast(x * SCALES[role], Format[fmt or "fp16"]))
            tables["scale"].append(torch.tensor(SCALES[role]))
            tables["amax"].append(x[x.isfinite()].abs().max())
            tables["errors"].append(torch.stack([(finite**2).sum(), ((finite - kept) ** 2).sum()]))
            tables["blocks"].append(torch.stack([torch.bincount(f.long(), minlength=256) for f in fields]))
            tables["lost"].append(torch.tensor(LOST if role == "update" else [0.0] * 5, dtype=torch.float64))
    stacked = {name: torch.stack(parts) for name, parts in tables.items() if name not in without}
    return record.Record(step, {"loss_scale": 8.0}, rows, stacked)


def count_cast(x, fmt):
    """int64 [5] by the definitions: elements, overflows, underflows, Inf and NaN of a cast to ``fmt``."""
    found = overflows(x, fmt), underflows(x, fmt) & x.isfinite(), x.isinf(), x.isnan()
    return torch.tensor([x.numel(), *(int(mask.sum()) for mask in found)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 10):
        record.append(folder / record.FILE, recorded(step))
    return folder


@pytest.fixture
def inspect(capsys, monkeypatch):
    def call(*words, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["inspect", *map(str, words)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["inspect", *map(str, words)])
        assert leaving.value.code == 2
        return capsys.readouterr().err

    return call
