"""The parts of an audit, and ``mptrain doctor --audit``."""

import math

import pytest
import torch
from audited_steps import HEALTHY, Step, flops_by_kind, wanted_flops
from torch import nn

from mptrain import Precision, cli
from mptrain.formats import Format, round_to
from mptrain.precision.backends.emulated import linear as fp8
from mptrain.precision.backends.emulated.gemm import _scaled_mm
from mptrain.precision.policy import PrecisionPolicy
from mptrain.report.audit import audit_rows
from mptrain.telemetry import peaks
from mptrain.telemetry.audit import StepAudit, backward_gemm
from mptrain.telemetry.coverage import Audit, Row
from mptrain.telemetry.products import flops_of, look, on_grid

pytestmark = pytest.mark.usefixtures("one_thread")


def test_products_that_cannot_be_seen_are_claimed_never_proven(monkeypatch):
    """A custom operator hides its GEMM, as Transformer Engine's do."""
    monkeypatch.setattr(fp8, "scaled_mm", _scaled_mm)
    audit = Step(HEALTHY["fp8"], checkpointing=True, accumulate=2).audited(min_coverage=0.5)
    wanted = wanted_flops(HEALTHY["fp8"], False, checkpointing=True, accumulate=2)
    assert flops_by_kind(audit) == wanted
    assert audit.problems() == []
    assert audit.asked_coverage == 0.0
    assert audit.claimed_coverage == pytest.approx(audit.coverage["fp8 claimed"])
    assert {row.evidence for row in audit.rows if row.claimed} == {"claimed by emulated"}
    assert "fp8 claimed" in audit.line()


@pytest.mark.parametrize("fmt", [Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32], ids=str)
@pytest.mark.parametrize("carrier", [torch.float32, torch.bfloat16], ids=str)
def test_on_grid_against_the_reference_rounding(fmt, carrier):
    """Every BF16 number: on the grid exactly if rounding leaves it as it is."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(carrier)
    every = every[~every.isnan()]
    if not fmt.value.has_inf:
        assert not on_grid(torch.tensor([math.inf], dtype=carrier), fmt)
        every = every[every.isfinite()]
    kept = every[round_to(every, fmt) == every.double()]
    assert on_grid(kept, fmt)
    off = every[round_to(every, fmt) != every.double()]
    for value in off[:: max(1, len(off) // 50)]:
        assert not on_grid(torch.cat([kept, value[None]]), fmt), value
    if fmt is not Format.fp8_e5m2 and carrier is torch.float32:
        assert not on_grid(torch.tensor([1.0 + 2.0**-12]), fmt)


def test_the_asked_format_is_tried_first_then_the_narrowest():
    both, three_bits, two_bits = torch.tensor([1.5, -2.0]), torch.tensor([1.125]), torch.tensor([49152.0])
    assert look(both, Format.fp8_e5m2, emulated=True).ran == "fp8_e5m2"
    assert look(both, Format.fp8_e4m3, emulated=True).ran == "fp8_e4m3"
    assert look(three_bits, Format.fp8_e5m2, emulated=True).ran == "fp8_e4m3"
    assert look(two_bits, Format.fp8_e4m3, emulated=True).ran == "fp8_e5m2"
    assert look(torch.tensor([1 + 2.0**-9]), Format.tf32, emulated=True).ran == "tf32"
    assert look(torch.tensor([1 + 2.0**-23]), Format.fp16, emulated=True).ran == "fp32"
    assert look(both, Format.fp8_e4m3, emulated=False).ran == "fp32"
    assert look(both, Format.bf16, emulated=True).ran == "fp32"
    assert look(both.to(torch.float8_e5m2), Format.fp8_e4m3, emulated=True).ran == "fp8_e5m2"


@pytest.mark.parametrize(("m", "n", "k"), [(5, 3, 7), (3, 3, 7), (5, 3, 3), (7, 3, 7), (4, 4, 4)])
def test_backward_products_are_told_apart(m, n, k):
    g, w, x = torch.randn(m, n), torch.randn(n, k), torch.randn(m, k)
    turned = n != k
    for weights in ((w[0],), ()):
        assert backward_gemm(g, w, n, k, weights) == ("grad_input", False)
        assert backward_gemm(g.t(), x, n, k, weights) == ("grad_weight", False)
    assert backward_gemm(w.t(), g.t(), n, k, (w[0],)) == ("grad_input", True)
    assert backward_gemm(x.t(), g, n, k, (w[0],)) == ("grad_weight", turned)
    assert backward_gemm(g.t().contiguous(), x, n, k, (w[0],))[0] == "grad_weight"  # as the C kernels lay it out


def test_flops_that_torch_does_not_count():
    a, b = torch.empty(3, 5, 7), torch.empty(3, 7, 11)
    grouped = torch.ops.aten._grouped_mm.default
    assert flops_of(grouped, (a, b), {}, None) == 2 * 3 * 5 * 7 * 11
    assert flops_of(grouped, (a[0], b), {}, None) == 2 * 5 * 7 * 11  # the rows of `a` are shared out to the groups
    assert flops_of(grouped, (a, b[0]), {}, None) == 2 * 5 * 7 * 11
    assert flops_of(grouped, (a[0], b[0]), {}, None) == 2 * 5 * 7 * 11


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3)
        self.last = nn.Linear(8, 16)

    def forward(self, x):
        return self.last(self.conv(x).transpose(1, 2)).float().square().mean()


def test_convolutions_and_other_products():
    model = Convolution()
    precision = Precision("bf16").prepare(model)
    with StepAudit(model, precision) as step:
        with precision.forward():
            loss = model(torch.randn(2, 4, 10)) + torch.bmm(torch.ones(3, 2, 4), torch.ones(3, 4, 5)).mean()
        precision.backward(loss)
    found = flops_by_kind(step.result)
    assert found["conv", "other", "forward"] == found["conv", "other", "backward"] == 2 * 2 * 8 * (8 * 4 * 3)
    assert found["", "other", "forward"] == 2 * 3 * 2 * 4 * 5
    assert step.result.problems() == []


def test_the_rate_is_weighted_by_what_ran():
    rates = {"fp8": 2000.0, "bf16": 1000.0}
    assert peaks.weighted_rate(rates, {"fp8": 0.8, "bf16": 0.2}) == pytest.approx(1 / (0.0004 + 0.0002))
    assert peaks.weighted_rate(rates, {"fp8 claimed": 1.0}) == 2000.0
    assert peaks.weighted_rate(rates, {"fp8": 0.8, "fp32": 0.2}) is None
    assert peaks.weighted_rate(rates, {}) is None


def test_an_audit_that_saw_nothing_says_so():
    assert Audit(()).problems() == ["no matrix product was seen in the audited step"]
    row = Row("a", "output", "forward", ("bf16",) * 2, ("bf16",) * 2, ("bf16",) * 2, "dtype", 10, 1)
    audit = Audit((row,), PrecisionPolicy.named("bf16"))
    audit.require(1.0)
    assert audit_rows(audit) == [(("a", "output", "bf16", "bf16", "dtype"), 1.0)]


SMALL = ["model=gpt-nano", "model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.block_size=16"]


def test_doctor_audits_a_step(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["doctor", "--audit", "precision=fp8", "trainer.checkpointing=true", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "blocks.*.attention.qkv" in text
    assert "blocks.0" not in text
    assert "GEMM FLOPs: fp8" in text
    assert "OK: every GEMM" in text


def test_doctor_fails_below_the_coverage_asked(capsys):
    words = ["doctor", "--audit", "precision=fp8", "precision.keep='.*'", "audit.min_coverage=0.5", *SMALL]
    assert cli.main(words) == 1
    shown = capsys.readouterr()
    assert "problem: nothing was quantized: precision.keep='.*'" in shown.out
    assert "audit.min_coverage=0.5 is not reached: 0.0 % of the GEMM FLOPs ran in fp8" in shown.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("precision=fp9", "did you mean 'fp8'"),
        ("audit.min_coverge=1", "did you mean 'min_coverage'"),
        ("audit.min_coverage=2", "audit.min_coverage=2.0 cannot work: it must be from 0 to 1"),
        ("model.n_hed=2", "did you mean 'n_head'"),
    ],
)
def test_doctor_explains_what_cannot_work(word, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["doctor", "--audit", word])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
