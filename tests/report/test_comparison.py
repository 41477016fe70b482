"""Runs matched, paired and judged: folders written by hand, whose truth is known."""

import math
import re

import numpy as np
import pytest
import scipy.stats
from compared_runs import STEPS, by_label, sweep
from fake_runs import falling, settings, write
from hypothesis import given
from hypothesis import strategies as st

from mptrain.report.compare import intervals
from mptrain.report.compare.compare import compare
from mptrain.report.compare.comparison import Interval, Kind
from mptrain.report.compare.verdict import judge

# --- statistics against an independent implementation


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12))
def test_the_paired_interval_is_scipys_times_the_factor(values):
    found = intervals.paired(values)
    if len(set(values)) == 1:
        assert (found.low, found.high) == (values[0], values[0])
        return
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    wider = intervals.factor(len(values), intervals.PAIRED) * (high - low) / 2
    assert (found.low, found.high) == pytest.approx((found.mean - wider, found.mean + wider), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx((low + high) / 2)


def test_the_unpaired_interval_is_scipys_times_the_factor():
    ours, theirs = [1.0, 2.0, 4.0, 3.5], [2.0, 2.2, 1.9]
    found = intervals.welch(ours, theirs)
    expected = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(intervals.UNPAIRED[3] * (expected.high - expected.low))
    assert found.mean == pytest.approx((expected.low + expected.high) / 2)
    assert found.spreads == pytest.approx((np.std(ours, ddof=1), np.std(theirs, ddof=1)))


def test_no_number_of_seeds_decides_what_lies_on_the_border():
    border = Interval(0.0025, -1.0, 1.005, 3, "paired t")
    assert intervals.seeds_needed(border, 0.005) is None
    text = judge(border, 0.005, steps=300, seeds=3).text
    assert text == "undecided: 3 seeds are too few, plan over 1000 new ones"


@given(st.integers(1, 7), st.integers(1, 30))
def test_smoothing_is_the_mean_of_the_last_steps_that_are_known(window, steps):
    values = np.random.default_rng(steps).standard_normal((2, steps))
    values[0, ::3] = np.nan
    found = intervals.smooth(values, window)
    for row in range(2):
        for step in range(steps):
            known = values[row, max(0, step - window + 1) : step + 1]
            known = known[np.isfinite(known)]
            assert found[row, step] == pytest.approx(known.mean() if len(known) else math.nan, nan_ok=True)


def test_the_band_holds_a_further_seed_in_95_percent_of_cases():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(3000):
        curves = rng.standard_normal((4, 1))
        half = intervals.prediction_half_width(curves[:3], 1)
        inside.append(abs(curves[3, 0] - curves[:3].mean()) <= half[0])
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4))
def test_the_first_lasting_row(flags, length):
    runs = [i for i in range(len(flags)) if all(flags[i : i + length]) and (i == 0 or not flags[i - 1])]
    whole = [i for i in runs if len(flags[i : i + length]) == length or all(flags[i:])]
    assert intervals.first_lasting(np.array(flags, dtype=bool), length) == (whole[0] if whole else None)


# --- verdicts where the truth is known


def test_verdicts_follow_the_truth(tmp_path):
    found = by_label(compare([sweep(tmp_path, {"fp32": 0, "bf16": 0.0, "fp8": 0.06, "fp8-delayed": 0.004})]))
    kinds = {label: variant.verdict.kind for label, variant in found.items()}
    assert kinds == {
        "fp32": Kind.baseline, "bf16": Kind.equivalent, "fp8": Kind.worse, "fp8-delayed": Kind.equivalent,
    }  # fmt: skip
    worse = found["fp8"]
    assert worse.verdict.text.startswith("worse by 2.")
    assert worse.loss.val_delta.mean == pytest.approx(0.06 * 0.95 / 2.42, rel=0.1)
    assert worse.loss.tokens_to_baseline is None
    assert found["fp32"].loss.tokens_ratio == 1.0


@pytest.mark.parametrize("paired", [True, False])
def test_as_good_as_the_baseline_is_never_worse_beyond_the_stated_rate(paired):
    """200 comparisons of FP32 seeds with FP32 seeds: at most 2.5 % may be called worse (binomial: 10 in 200 at 1 %)."""
    rng = np.random.default_rng(5)
    worse = 0
    for _ in range(200):
        losses = rng.normal(2.4, 0.012, (2, 3))  # 0.5 % between seeds
        delta = (
            intervals.paired(((losses[0] - losses[1]) / losses[1]).tolist())
            if paired
            else intervals.welch(*(losses / losses[1].mean()).tolist())
        )
        worse += judge(delta, 0.005, steps=300, seeds=3).kind is Kind.worse
    assert worse <= scipy.stats.binom.ppf(0.99, 200, 0.025)


def test_too_few_seeds_are_undecided_with_a_number(tmp_path):
    one = by_label(compare([sweep(tmp_path / "one", {"fp32": 0, "bf16": 0}, seeds=[0])]))["bf16"]
    assert one.verdict.text == "undecided: needs 2 more seeds"
    root = tmp_path / "two"
    for seed, val in enumerate((2.40, 2.43)):
        write(root / f"fp32,{seed}", settings("fp32", seed), val=2.4)
        write(root / f"fp8,{seed}", settings("fp8", seed), val=val)
    two = by_label(compare([root]))["fp8"]
    assert two.verdict.kind is Kind.undecided
    assert re.fullmatch(r"undecided: 2 seeds are too few, plan \d+ new ones", two.verdict.text)


def test_short_runs_are_undecided(tmp_path):
    verdict = by_label(compare([sweep(tmp_path, {"fp32": 0, "fp8": 0.06}, steps=60)]))["fp8"].verdict
    assert verdict.text == "undecided: 60 steps are too few, use trainer.max_steps=100 or more"


def test_divergence_says_where_and_why(tmp_path):
    root = sweep(tmp_path, {"fp32": 0})
    nan = np.concatenate((falling(seed=0)[:120], [np.nan] * 80))
    events = [{"event": "skipped", "step": 118, "reason": "inf in grad_output", "layer": "blocks.1.mlp.up"}]
    write(root / "fp16", settings("fp16", 0), nan, val=math.nan, events=events)
    lost = np.concatenate((falling(seed=1)[:100], np.linspace(2.5, 5.4, 100)))
    write(root / "bf16", settings("bf16", 1), lost)
    skips = [{"event": "skipped", "step": step, "reason": "inf in a gradient"} for step in (50, *range(181, 201))]
    write(root / "fp8", settings("fp8", 2), falling(seed=2), events=skips)
    found = {label: variant.verdict for label, variant in by_label(compare([root])).items()}
    assert found["fp16"].text == (
        "diverged at step 121 because the training loss is not a finite number "
        "(step 118: inf in grad_output in blocks.1.mlp.up)"
    )
    assert found["bf16"].text.startswith("diverged at step 1")
    assert "the training loss rose from 2.5" in found["bf16"].text
    assert "step 181 because the last 20 steps were all skipped" in found["fp8"].text
    assert by_label(compare([root]))["fp16"].loss.val is None


def test_a_baseline_that_diverged_judges_nobody(tmp_path):
    bad = np.concatenate((falling()[:100], [np.inf] * 100))
    write(tmp_path / "fp32", settings("fp32"), bad, val=math.nan)
    write(tmp_path / "fp8", settings("fp8"))
    assert by_label(compare([tmp_path]))["fp8"].verdict.text == "the baseline itself diverged at step 101"


def test_the_first_step_outside_the_band(tmp_path):
    root = sweep(tmp_path, {"fp32": 0})
    for seed in range(3):
        losses = falling(seed=seed) + np.where(np.arange(STEPS) >= 140, 0.8, 0.0)
        write(root / f"fp8,{seed}", settings("fp8", seed), losses)
    assert 140 < by_label(compare([root]))["fp8"].loss.outside_step <= 144  # the mean of the last 4 steps


def test_accuracy_is_what_counts_where_there_is_one(tmp_path):
    for seed in range(4):
        good, bad = {"val_top1_frac": 0.97 + 0.001 * seed}, {"val_top1_frac": 0.90 + 0.002 * seed}
        write(tmp_path / f"fp32,{seed}", settings("fp32", seed), summary=good)
        write(tmp_path / f"bf16,{seed}", settings("bf16", seed), summary=good)
        write(tmp_path / f"fp8,{seed}", settings("fp8", seed), summary=bad)
    comparison = compare([tmp_path])
    assert comparison.groups[0].metric == "top-1"
    found = by_label(comparison)
    assert found["bf16"].verdict.kind is Kind.equivalent
    assert found["fp8"].verdict.text == "worse by 6.8 points"
    assert found["fp8"].verdict.why.startswith("-6.85 points [-7.11, -6.59] over 4 seeds")
    assert found["fp8"].loss.top1_delta.mean == pytest.approx(-0.0685)


# --- speed and memory


def test_speed_is_a_ratio_of_the_same_seed_and_machine(tmp_path):
    for seed, (fp32, bf16) in enumerate(((100.0, 180.0), (100.0, 200.0), (200.0, 380.0))):
        share = {"gemm_coverage": {"fp32": 1.0}, "mfu_frac": 0.4}
        write(tmp_path / f"fp32,{seed}", settings("fp32", seed), summary=share | {"tokens_per_s": fp32})
        share = {"gemm_coverage": {"bf16": 1.0}, "mfu_frac": 0.3}
        write(tmp_path / f"bf16,{seed}", settings("bf16", seed), summary=share | {"tokens_per_s": bf16})
    write(tmp_path / "fp8", settings("fp8"), about={"emulated": True})
    write(tmp_path / "tf32", settings("tf32"), about={"machine": "another"})
    found = {label: variant.speed for label, variant in by_label(compare([tmp_path])).items()}
    assert (found["bf16"].ratio, found["bf16"].ratio_low, found["bf16"].ratio_high) == (1.9, 1.8, 2.0)
    # One token takes 10 ms at 100 tokens/s, of which 1e6 FLOPs at 0.1 TFLOP/s are 10 us; BF16 takes a quarter of them.
    assert found["bf16"].limit == pytest.approx(0.01 / (0.01 - 1e-5 * 0.75))
    assert found["bf16"].mfu_frac == 0.3
    assert (found["fp8"].ratio, found["fp8"].reached_frac) == (None, None)
    assert "emulated" in found["fp8"].note
    assert found["tf32"].ratio is None
    assert "another machine" in found["tf32"].note


def test_runs_side_by_side_are_said_to_have_disturbed_each_other(tmp_path):
    for name, start, end in (("fp32", "10:00:00", "10:05:00"), ("bf16", "10:04:00", "10:09:00")):
        write(tmp_path / name, settings(name), about={"started": start}, summary={"ended": end})
    assert by_label(compare([tmp_path]))["bf16"].speed.note == "measured while other runs were in progress"
