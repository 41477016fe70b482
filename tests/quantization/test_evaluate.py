"""Evaluation of a quantized model: figures against formulas by hand, intervals against draws, blame against damage."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mptrain.models import gpt, vit
from mptrain.quantization import evaluate as evaluation
from mptrain.quantization.evaluate import evaluate, layer_errors, sqnr_db
from mptrain.report.compare import intervals
from mptrain.report.compare.comparison import Interval

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 31


class Table(nn.Module):
    """Logits looked up by token: a model whose every figure can be worked out by hand."""

    def __init__(self, logits):
        super().__init__()
        self.rows = nn.Parameter(logits)

    def forward(self, tokens):
        return self.rows[tokens]


def tables(seed=0, noise=0.3):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, VOCAB, generator=draw)
    return Table(logits + noise * torch.randn(VOCAB, VOCAB, generator=draw)), Table(logits)


def token_batches(count=3, samples=4, length=16, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        found = torch.randint(VOCAB, (samples, length + 1), generator=draw)
        yield {"tokens": found[:, :-1], "targets": found[:, 1:]}


def by_hand(model, reference, batches):
    """Of each prediction: losses of both, KL(reference || model), whether they agree; in numpy."""
    rows = []
    for batch in batches:
        for x, y in zip(batch["tokens"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True):
            q, p = (np.exp(t.rows[x].detach().double().numpy()) for t in (model, reference))
            q, p = q / q.sum(), p / p.sum()
            rows.append((-np.log(q[y]), -np.log(p[y]), np.sum(p * (np.log(p) - np.log(q))), q.argmax() == p.argmax()))
    return np.array(rows, dtype=float)


def test_figures_of_text_are_those_of_the_formulas():
    model, reference = tables()
    found = evaluate(model, reference, token_batches(), repeats=0)
    rows = by_hand(model, reference, token_batches())
    samples = rows.reshape(12, 16, 4).mean(1)
    assert (found.unit, found.samples, found.predictions) == ("tokens", 12, 192)
    for interval, values in (
        (found.loss, samples[:, 0]),
        (found.reference_loss, samples[:, 1]),
        (found.loss_delta, samples[:, 0] - samples[:, 1]),
        (found.kl_nats, samples[:, 2]),
    ):
        low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
        assert [interval.mean, interval.low, interval.high] == pytest.approx([values.mean(), low, high], rel=1e-6)
        assert interval.n == 12
    assert found.kl_worst == pytest.approx(rows[:, 2].max(), rel=1e-6)
    assert found.same_frac == pytest.approx(rows[:, 3].mean())
    assert found.losses == pytest.approx(samples[:, 0], rel=1e-6)
    assert intervals.perplexity(found.loss).high == pytest.approx(math.exp(found.loss.high))
    assert (found.top1, found.latencies, found.layers) == (None, [], [])


def test_chunks_of_samples_give_the_same(monkeypatch):
    model, reference = tables()
    whole = evaluate(model, reference, token_batches(), repeats=0)
    monkeypatch.setattr(evaluation, "AT_A_TIME", 1)
    assert evaluate(model, reference, token_batches(), repeats=0) == whole


def test_a_model_beside_itself_loses_nothing():
    model, _ = tables()
    found = evaluate(model, copy.deepcopy(model), token_batches(), repeats=0)
    assert (found.loss_delta.mean, found.loss_delta.high) == (0.0, 0.0)
    assert (found.kl_nats.mean, found.kl_worst, found.same_frac) == (0.0, 0.0, 1.0)


def small_gpt():
    torch.manual_seed(0)
    model = gpt.build(gpt.Config(VOCAB, 32, n_layer=2, n_head=2, n_embd=32, tied=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_damaged_layer_is_named_worst_and_those_after_it_are_not_blamed():
    reference = small_gpt()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                scale = 0.5 if name == "blocks.0.mlp.up" else 1e-4
                layer.weight.mul_(1 + scale * torch.randn_like(layer.weight))
    batch = next(token_batches(length=32))
    rows = layer_errors(model, reference, batch, {"blocks.0.mlp.up": 6.0})
    assert {row.layer for row in rows} == {n for n, m in reference.named_modules() if isinstance(m, nn.Linear)}
    assert rows[0].layer == "blocks.0.mlp.up"
    assert rows[0].weight_db == 6.0
    assert rows[0].own_db == pytest.approx(6.0, abs=1.5)  # 20 log10(1 / 0.5)
    last = next(row for row in rows if row.layer == "blocks.1.mlp.down")
    assert last.own_db > 60
    assert last.output_db < last.own_db - 20  # what it inherits
    assert rows == sorted(rows, key=lambda row: row.own_db)
    assert not any(module._forward_hooks for m in (model, reference) for module in m.modules())


def test_sqnr_by_hand():
    right = torch.tensor([3.0, 4.0])
    assert sqnr_db(right, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)  # 25 over 0.25
    assert sqnr_db(right, right) == math.inf
    assert sqnr_db(torch.zeros(2), right) == -math.inf


class Paced(nn.Module):
    """Takes the next of ``seconds`` on a clock of its own with every forward."""

    def __init__(self, seconds, clock):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seconds, self.clock = iter(seconds), clock

    def forward(self, tokens):
        self.clock[0] += next(self.seconds)


@pytest.mark.parametrize("samples", [1, 8])
def test_latencies_are_medians_of_turns_after_a_warm_up(samples):
    clock = [5.0]
    reference = Paced([9.0, 0.010, 0.030, 0.020], clock)
    model = Paced([7.0, 0.100, 0.060, 0.050], clock)
    batch = next(token_batches(length=32, samples=samples))
    row = evaluation.latency(model, reference, batch, 3, clock=lambda: clock[0])
    assert row.batch == samples
    assert [row.ms, row.reference_ms] == pytest.approx([60.0, 20.0])
    assert row.units_per_s == pytest.approx(samples * 32 / 0.060)
    assert [row.low, row.speed_ratio, row.high] == pytest.approx([0.1, 0.4, 0.5])


def test_one_sample_and_the_batch_are_timed():
    reference = small_gpt()
    batches = [next(token_batches(length=32, samples=8))]
    found = evaluate(copy.deepcopy(reference), reference, batches, repeats=1)
    assert [row.batch for row in found.latencies] == [1, 8]
    assert all(row.ms > 0 and row.low == row.speed_ratio == row.high > 0 for row in found.latencies)
    assert found.layers[0].own_db == math.inf
    assert found.machine


def test_figures_of_images_have_exact_intervals():
    torch.manual_seed(0)
    model = vit.build(vit.Config(8, 1, 10, n_layer=1, n_head=2, n_embd=16))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.add_(0.3 * torch.randn_like(model.head.weight))
    images = torch.randn(90, 1, 8, 8)
    labels = torch.where(torch.arange(90) % 3 == 0, reference(images).argmax(-1), torch.randint(10, (90,)))
    found = evaluate(model, reference, [{"images": images, "labels": labels}], repeats=0)
    right = model(images).argmax(-1) == labels
    before = reference(images).argmax(-1) == labels
    exact = stats.binomtest(int(right.sum()), 90).proportion_ci(0.95, "exact")
    assert found.unit == "images"
    assert [found.top1.mean, found.top1.low, found.top1.high] == pytest.approx(
        [right.float().mean().item(), exact.low, exact.high]
    )
    assert found.reference_top1.mean == pytest.approx(before.float().mean().item())
    assert found.top1_delta.mean == pytest.approx((right.float() - before.float()).mean().item())
    assert found.top1_delta.low < found.top1_delta.mean < found.top1_delta.high
    assert found.hits == right.double().tolist()


def test_proportions_are_covered():
    """Of many drawn experiments at least 95 % (less what 4,000 draws may miss) hold the truth; Wald's would not."""
    draw = np.random.default_rng(0)
    share = [intervals.proportion(int(k), 60) for k in draw.binomial(60, 0.97, 4000)]
    assert np.mean([i.low <= 0.97 <= i.high for i in share]) > 0.94
    cells = draw.multinomial(360, [0.01, 0.02, 0.97], 4000)  # gained, lost, neither: a point is lost
    held = [intervals.paired_proportions(int(up), int(down), 360) for up, down, _ in cells]
    covered = np.mean([i.low <= -0.01 <= i.high for i in held])
    assert 0.93 < covered < 0.985
    assert np.mean([i.high - i.low for i in held]) < 0.05


def test_the_interval_of_a_paired_difference_covers_drawn_losses():
    draw = np.random.default_rng(1)
    shared = draw.normal(2.0, 0.5, (2000, 24))  # how hard each sample is
    ours = shared + draw.normal(0.02, 0.03, shared.shape)
    held = [evaluation.loss_delta(a.tolist(), b.tolist()) for a, b in zip(ours, shared, strict=True)]
    covered = np.mean([i.low <= 0.02 <= i.high for i in held])
    assert 0.93 < covered < 0.97
    assert np.mean([i.high - i.low for i in held]) < 0.1 * np.mean(
        [i.high - i.low for i in (intervals.mean_of(row.tolist(), "") for row in ours)]
    )


def test_extremes_have_ends():
    assert intervals.proportion(0, 10) == Interval(0.0, 0.0, pytest.approx(0.3085, abs=1e-4), 10, "Clopper-Pearson")
    assert intervals.proportion(10, 10).high == 1.0
    none = intervals.paired_proportions(0, 0, 50)
    assert none.low < 0.0 < none.high
    assert math.isnan(intervals.mean_of([1.0], "").low)


def test_nothing_to_evaluate_on_is_an_error():
    model, reference = tables()
    with pytest.raises(ValueError, match="--batches 1"):
        evaluate(model, reference, [])
