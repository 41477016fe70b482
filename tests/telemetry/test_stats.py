"""Statistics: the law that all of them obey, and that adding one takes a decorated function and nothing else."""

import pytest
import torch
from torch import nn

from mptrain import Format, Precision
from mptrain.telemetry import stats
from mptrain.telemetry.monitor import Monitor, TelemetryConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(seed):
    """Two matrices of one width, wide in range, with zeros and every kind of special value."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in (5, 12):
        x = torch.randn(rows, 128, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator) * 9)
        x[0, :7] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3.4e38])
        made.append(x)
    return made


@pytest.mark.parametrize("cast", [None, (Format.fp8_e4m3, 4.0), (Format.fp8_e5m2, 0.3), (Format.bf16, 1.0)])
@pytest.mark.parametrize("name", stats.STATISTICS)
def test_states_of_parts_add_up_to_the_state_of_the_whole(name, cast):
    """finish(measure(a) + measure(b)) == finish(measure(a ++ b)); whole numbers to the last one."""
    if cast is None and name in ("counts", "errors"):
        pytest.skip("these are of a cast")
    statistic = stats.STATISTICS[name]
    given = None if cast is None else (cast[0], torch.tensor(cast[1]))
    a, b = tensors(len(name))
    merged = statistic.measure(a, given) + statistic.measure(b, given)
    whole = statistic.measure(torch.cat([a, b]), given)
    if merged.dtype is torch.int64:
        assert torch.equal(merged, whole)
    for figure, value in statistic.finish(merged[None]).items():
        torch.testing.assert_close(value, statistic.finish(whole[None])[figure], rtol=1e-5, atol=0.0, equal_nan=True)


def test_figures_of_planted_states():
    counts = stats.STATISTICS["counts"].finish(torch.tensor([[1000, 3, 50, 1, 2]]))
    assert (counts["saturated_frac"].item(), counts["flushed_frac"].item()) == (0.003, 0.05)
    errors = stats.STATISTICS["errors"].finish(torch.tensor([[100.0, 1.0], [5.0, 0.0], [0.0, 0.0]]).double())
    assert errors["sqnr_db"][0].item() == 20.0
    assert errors["sqnr_db"][1:].isnan().all()
    blocks = torch.zeros(2, 2, 256, dtype=torch.int64)
    blocks[0, 0, [100, 110, 120]] = torch.tensor([1, 6, 2])  # the median block lies 10 octaves below the largest
    blocks[0, 0, [0, 255]] = 50  # blocks of zeros and of Inf say nothing
    figures = stats.STATISTICS["blocks"].finish(blocks)
    assert figures["spread32_bits"][0].item() == 10
    assert figures["spread128_bits"][0].isnan()
    assert figures["spread32_bits"][1].isnan()


def test_adding_a_statistic_takes_one_function(monkeypatch):
    """It is measured on every row, merged over micro-batches, stored in the record and shown as a metric."""
    monkeypatch.setattr(stats, "STATISTICS", dict(stats.STATISTICS))
    monkeypatch.setattr("mptrain.telemetry.observer.STATISTICS", stats.STATISTICS)
    monkeypatch.setattr("mptrain.telemetry.monitor.STATISTICS", stats.STATISTICS)

    @stats.statistic
    def mean_square(states):
        return {"mean_square": states[:, 0] / states[:, 1]}

    @mean_square.measured
    def _(x, cast):
        return torch.tensor([x.double().square().sum(), x.numel()], dtype=torch.float64)

    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    precision = Precision("fp8").prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monitor = Monitor(model, precision, TelemetryConfig(), 1)
    weight = model[0].weight.detach().clone()
    xs = torch.randn(2, 16, 32)
    assert monitor.due(1)
    monitor.begin_step(1)
    for x in xs:
        with precision.forward():
            loss = model(x).square().mean()
        precision.backward(loss)
    monitor.see_gradients()
    sample = monitor.end_step(1, optimizer, precision.step(optimizer))
    assert sample.metrics["mean_square/0/input"] == pytest.approx(float(xs.square().mean()))
    assert sample.metrics["mean_square/0/weight"] == pytest.approx(float(weight.square().mean()))
    assert sample.metrics["mean_square/0/grad_output"] > 0
    row = [(layer, role) for layer, role, _ in sample.record.rows].index(("0", "input"))
    assert sample.record.tables["mean_square"][row, 1] == xs.numel()
