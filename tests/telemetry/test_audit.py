"""The audit of executed precision: healthy runs pass, each planted defect is named, and training does not notice."""

import contextlib
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mptrain import Precision, cli, kernels
from mptrain.formats import Format, round_to
from mptrain.models import gpt, llama
from mptrain.precision.backends.emulated import backend as emulated
from mptrain.precision.backends.emulated import linear as fp8
from mptrain.precision.backends.emulated.gemm import _scaled_mm
from mptrain.precision.convert import HOOKS, ConversionReport
from mptrain.precision.policy import PrecisionPolicy, Scaling
from mptrain.report.audit import audit_rows
from mptrain.telemetry import peaks
from mptrain.telemetry.audit import StepAudit, backward_gemm
from mptrain.telemetry.coverage import Audit, Row
from mptrain.telemetry.products import flops_of, look, on_grid

pytestmark = pytest.mark.usefixtures("one_thread")
E, LAYERS, B, T, VOCAB = 32, 2, 2, 16, 32  # as many tokens as outputs of a layer: the shapes alone say nothing
SIZES = gpt.Config(vocab_size=VOCAB, block_size=T, n_layer=LAYERS, n_head=2, n_embd=E)
LINEAR = {"attention.qkv": (3 * E, E), "attention.out": (E, E), "mlp.up": (4 * E, E), "mlp.down": (E, 4 * E)}


def policy_of(name, backend="auto", scaling=None, **other):
    policy = replace(PrecisionPolicy.named(name), backend=backend, **other)
    if scaling is None:
        return policy
    return replace(policy, quantization=replace(policy.quantization, scaling=Scaling[scaling]))


class Step:
    """A GPT (or another model) in a precision and its training steps on random tokens."""

    def __init__(self, policy, *, checkpointing=False, accumulate=1, config=SIZES, module=gpt):
        torch.manual_seed(0)
        self.model = module.build(config)
        self.precision = Precision(policy).prepare(self.model)
        self.accumulate = accumulate
        self.vocabulary = config.vocab_size
        if checkpointing:
            self.model.recompute = self.precision.recompute

    def run(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(self.accumulate):
            tokens = torch.randint(self.vocabulary, (B, T), generator=generator)
            with self.precision.forward():
                loss = self.model(tokens, tokens.roll(1)) / self.accumulate
            self.precision.backward(loss)
            losses.append(loss.detach())
        return losses

    def audited(self, **settings):
        with StepAudit(self.model, self.precision, **settings) as step:
            self.losses = self.run()
        return step.result


HEALTHY = {
    "fp32": policy_of("fp32"),
    "tf32": policy_of("tf32"),
    "bf16": policy_of("bf16"),
    "fp16": policy_of("fp16"),
    "fp8": policy_of("fp8"),
    "fp8-delayed": policy_of("fp8-delayed"),
    "fp8-rowwise": policy_of("fp8-rowwise"),
    "fp8-tied-head": policy_of("fp8", keep_default=""),
    "fp8-native": policy_of("fp8", "native"),
    "fp8-native-rowwise": policy_of("fp8", "native", "rowwise"),
}


def wanted_flops(policy, own_linear, *, checkpointing, accumulate):
    """(kind of layer, GEMM, stage) -> FLOPs, by hand: 2 M N K for each product."""
    rows = B * T
    wanted = {("head", gemm, stage): 2 * rows * VOCAB * E * accumulate for gemm, stage in THREE}
    for name, (n, k) in LINEAR.items():
        for gemm, stage in THREE:
            wanted[f"blocks.*.{name}", gemm, stage] = 2 * rows * n * k * LAYERS * accumulate
        # Torch's own linear keeps its operands before it multiplies: recomputation ends at a block's last one.
        if checkpointing and not (own_linear and name == "mlp.down"):
            wanted[f"blocks.*.{name}", "output", "recompute"] = 2 * rows * n * k * LAYERS * accumulate
    product = 2 * B * T * T * E * LAYERS * accumulate  # of all heads, not halved for causality
    attention = "blocks.*.attention", "attention"
    wanted |= {(*attention, "forward"): 2 * product, (*attention, "backward"): 5 * product}
    if checkpointing:
        wanted[(*attention, "recompute")] = 2 * product
    return wanted


THREE = (("output", "forward"), ("grad_input", "backward"), ("grad_weight", "backward"))


def flops_by_kind(audit):
    found = defaultdict(int)
    for row in audit.rows:
        found[row.layer.replace(".0.", ".*.").replace(".1.", ".*."), row.gemm, row.stage] += row.flops
    return found


@pytest.mark.parametrize(("checkpointing", "accumulate"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_problem_and_the_flops_counted_by_hand(name, checkpointing, accumulate):
    policy = HEALTHY[name]
    step = Step(policy, checkpointing=checkpointing, accumulate=accumulate)
    audit = step.audited(min_coverage=0.5)
    assert audit.problems() == []
    wanted = wanted_flops(policy, not policy.quantized, checkpointing=checkpointing, accumulate=accumulate)
    assert flops_by_kind(audit) == wanted
    assert audit.flops == sum(wanted.values())
    assert sum(audit.coverage.values()) == pytest.approx(1.0)
    in_bf16 = sum(flops for (kind, gemm, _), flops in wanted.items() if gemm == "attention" or kind == "head")
    if name == "fp8-tied-head":
        in_bf16 = sum(flops for (_, gemm, _), flops in wanted.items() if gemm == "attention")
    narrow = 1.0 - in_bf16 / audit.flops if policy.quantized else 1.0
    assert audit.asked_coverage == pytest.approx(narrow)
    assert audit.claimed_coverage == 0.0
    if policy.quantized:
        assert audit.coverage == pytest.approx({"fp8": narrow, "bf16": 1.0 - narrow})
    else:
        assert audit.coverage == {policy.name: 1.0}


def test_evidence_is_the_type_where_it_can_be_and_the_values_where_an_emulation_carries_them():
    found = {}
    for name in ("bf16", "fp16", "tf32", "fp8", "fp8-native-rowwise"):
        rows = Step(HEALTHY[name]).audited().rows
        found[name] = {(row.evidence, row.carrier[0]) for row in rows if row.layer == "blocks.0.mlp.up"}
    carrier = str(Step(HEALTHY["fp8"]).precision.backend.carrier).split()[0].replace("bfloat16", "bf16")
    assert found == {
        "bf16": {("dtype", "bf16")},
        "fp16": {("values", "fp32")},
        "tf32": {("values", "fp32")},
        "fp8": {("values", carrier.replace("float32", "fp32"))},
        "fp8-native-rowwise": {("values", "fp32")},
    }


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_llama_and_another_number_of_tokens(name):
    config = llama.Config(vocab_size=48, block_size=T, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_ffn=64)
    audit = Step(HEALTHY[name], config=config, module=llama, checkpointing=True).audited()
    assert audit.problems() == []
    found = flops_by_kind(audit)
    for gemm, stage in THREE:
        assert found["blocks.*.mlp.gate", gemm, stage] == 2 * B * T * 64 * 32
        assert found["head", gemm, stage] == 2 * B * T * 48 * 32
        assert found["blocks.*.attention.k", gemm, stage] == 2 * B * T * 16 * 32


@pytest.mark.parametrize("name", ["fp8-delayed", "fp8-native"])
def test_the_training_is_bit_for_bit_the_same(name):
    """Losses, gradients, scales and counters of two steps, the first of them audited or not."""
    runs = [Step(HEALTHY[name], checkpointing=True, accumulate=2) for _ in range(2)]
    for step in runs:
        step.precision.counters.sample()
    losses = [runs[0].run(), (runs[1].audited(), runs[1].losses)[1]]
    losses = [first + step.run(1) for first, step in zip(losses, runs, strict=True)]
    assert losses[0] == losses[1]
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    counts = [step.precision.counters for step in runs]
    for field in ("amax", "scale", "fault"):
        assert torch.equal(getattr(counts[0], field), getattr(counts[1], field)), field
    sums = [counters.take() for counters in counts]
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])
    states = [step.precision.state_dict()["fp8"] for step in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8", "fp8-native"])
def test_gradients_are_those_of_an_unaudited_step(name):
    """For fp8 the shapes of gpt-nano, where the layout of a kernel's operand changes the order of its sum."""
    rows, width = (4, 256) if name == "fp8" else (2, 16)
    sizes = replace(SIZES, block_size=width, n_layer=1, n_embd=width)
    grads = []
    for audited in (False, True):
        step = Step(HEALTHY[name], config=sizes)
        tokens = torch.randint(VOCAB, (rows, width), generator=torch.Generator().manual_seed(1))
        with StepAudit(step.model, step.precision) if audited else contextlib.nullcontext():
            with step.precision.forward():
                loss = step.model(tokens, tokens)
            step.precision.backward(loss)
        grads.append([loss.detach(), *(p.grad for p in step.model.parameters())])
    assert all(torch.equal(plain, watched) for plain, watched in zip(*grads, strict=True))


def test_hooks_and_mode_are_gone_afterwards_also_after_an_error():
    step = Step(HEALTHY["fp8"], checkpointing=True)

    def hooks():
        return [len(getattr(module, name)) for module in step.model.modules() for name in HOOKS]

    before = hooks()
    step.audited()
    assert hooks() == before
    with pytest.raises(KeyError), StepAudit(step.model, step.precision) as audit:
        raise KeyError
    assert audit.result is None
    assert hooks() == before
    assert torch._C._len_torch_dispatch_stack() == 0
    assert kernels.operators._onlookers == 0


# ---- defects -------------------------------------------------------------------------------------------------------


def test_a_layer_left_in_bf16_because_of_its_size():
    config = replace(SIZES, vocab_size=250)
    audit = Step(policy_of("fp8", keep_default=""), config=config).audited()
    (problem,) = audit.problems()
    assert problem.startswith("head: kept in bf16: 250x32 is not divisible by 16")
    assert {row.format for row in audit.rows if row.layer == "blocks.1.mlp.up"} == {"fp8"}
    share = sum(row.flops for row in audit.rows if row.layer == "head") / audit.flops
    assert f"({100 * share:.1f} % of the GEMM FLOPs)" in problem
    assert (
        audit.line()
        == f"fp8 {100 * audit.coverage['fp8']:.1f} %, bf16 {100 * audit.coverage['bf16']:.1f} % (attention, head)"
    )


@pytest.fixture
def bf16_carrier(monkeypatch):
    """Whatever a busy machine measures."""
    monkeypatch.setattr(emulated, "carrier_dtype", lambda device_type: torch.bfloat16)


def test_recomputation_that_did_not_quantize(monkeypatch, bf16_carrier):
    step = Step(HEALTHY["fp8"], checkpointing=True)
    plain = fp8.Quantizers._cast

    def cast(self, x, role, scale, counts, amax):
        """As it is, but for the operands of a recomputation, which stay as they came."""
        codes, values = plain(self, x, role, scale, counts, amax)
        recomputed = self._counters.replaying and role != "grad_output"
        return (codes, x.to(values.dtype)) if recomputed else (codes, values)

    monkeypatch.setattr(fp8.Quantizers, "_cast", cast)
    problems = step.audited().problems()
    assert problems[0].startswith("recomputation of blocks.*.mlp.up (2 layers) ran in bf16, not fp8")
    assert len(problems) == len(LINEAR)
    assert all(problem.startswith("recomputation of blocks.*") for problem in problems)


class Forgetful(torch.autograd.Function):
    """Activation checkpointing as it is often written: its recomputation runs outside every context."""

    @staticmethod
    def forward(ctx, fn, x):
        ctx.fn = fn
        ctx.save_for_backward(x)
        return fn(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.fn(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def test_recomputation_outside_autocast():
    step = Step(HEALTHY["bf16"])
    step.model.recompute = Forgetful.apply
    audit = step.audited()
    problems = audit.problems()
    assert any(
        problem.startswith("recomputation of blocks.*.mlp.up (2 layers) ran in fp32, not bf16") for problem in problems
    )
    assert any(
        problem.startswith("grad_weight of blocks.*.mlp.up (2 layers) ran in fp32, not bf16") for problem in problems
    )
    assert not any("head" in problem for problem in problems)
    assert audit.asked_coverage < 0.5


def test_reentrant_checkpointing_is_attributed_too():
    step = Step(HEALTHY["bf16"])
    step.model.recompute = lambda block, x: checkpoint(block, x, use_reentrant=True)
    audit = step.audited()
    assert audit.problems() == []
    found = flops_by_kind(audit)
    for gemm, stage in (*THREE, ("output", "recompute")):
        assert found["blocks.*.mlp.up", gemm, stage] == 2 * B * T * 4 * E * E * LAYERS


def test_grad_output_in_the_format_of_the_forward(monkeypatch):
    policy = HEALTHY["fp8"]
    monkeypatch.setattr(type(policy.quantization), "format_of", lambda self, role: self.forward)
    problems = Step(policy).audited().problems()
    assert any(p.startswith("grad_output of blocks.*.mlp.up (2 layers) was fp8_e4m3, asked fp8_e5m2") for p in problems)
    assert len(problems) == len(LINEAR)


def test_operands_that_were_never_quantized(monkeypatch, bf16_carrier):
    def cast(self, x, role, scale, counts, amax):
        values = x.to(self.carrier)
        return (values, values.t()) if role == "grad_output" else (x.to(torch.float8_e4m3fn), values)

    monkeypatch.setattr(fp8.Quantizers, "_cast", cast)
    audit = Step(HEALTHY["fp8"]).audited()
    assert any(p.startswith("output of blocks.*.mlp.up (2 layers) ran in bf16, not fp8") for p in audit.problems())
    # Of the backward the operands kept as codes are E4M3 still; grad_output is not.
    assert any("grad_output of blocks.*.mlp.up (2 layers) was bf16, asked fp8_e5m2" in p for p in audit.problems())
    assert audit.asked_coverage == 0.0


class Widened(nn.Module):
    """A product that leaves autocast, as torch's unfused attention does under dropout on a CPU."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return torch.bmm(x.float(), x.float().transpose(1, 2))


def test_a_product_outside_the_linear_layers_that_left_autocast():
    model = nn.Sequential(nn.Linear(8, 16), Widened())
    precision = Precision("bf16").prepare(model)
    with StepAudit(model, precision) as step:
        with precision.forward():
            loss = model(torch.randn(2, 4, 8)).mean()
        precision.backward(loss)
    rows = {(row.layer, row.stage, row.format): row.flops for row in step.result.rows}
    assert rows["1", "forward", "fp32"] == 2 * 2 * 4 * 16 * 4
    assert rows["1", "backward", "fp32"] == 2 * rows["1", "forward", "fp32"]
    backward, forward = step.result.problems()
    assert backward.startswith("a product of 1 ran in fp32 in backward, not bf16")
    assert forward.startswith("a product of 1 ran in fp32, not bf16")


def test_nothing_quantized_by_request():
    audit = Step(policy_of("fp8", keep=".*")).audited()
    assert audit.problems() == ["nothing was quantized: precision.keep='.*' keeps every linear layer"]
    assert audit.coverage == {"bf16": 1.0}
    assert audit.asked_coverage == 0.0


def test_nothing_quantized_without_a_word(monkeypatch):
    """A conversion that reports every layer and swaps none, and one that does not even report."""
    for names in (("head", *(f"blocks.{i}.{name}" for i in range(LAYERS) for name in LINEAR)), ()):
        step = Step(HEALTHY["bf16"])
        step.precision.policy = policy_of("fp8", keep_default="")
        step.precision.report = ConversionReport(names)
        problems = step.audited().problems()
        assert problems[0] == "nothing was quantized"
        assert any(p.startswith("output of blocks.*.mlp.up (2 layers) ran in bf16, not fp8") for p in problems)
        with pytest.raises(ValueError, match=r"audit.min_coverage=0.5 .* 0.0 % .* fp8 .* nothing was quantized"):
            step.audited(min_coverage=0.5)


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


# ---- the parts -----------------------------------------------------------------------------------------------------


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
    assert "no problem" in text


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
