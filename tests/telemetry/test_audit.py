"""The audit of executed precision: healthy runs pass, each planted defect is named, and training does not notice."""

import contextlib
from dataclasses import replace

import pytest
import torch
from audited_steps import (
    HEALTHY,
    LAYERS,
    LINEAR,
    SIZES,
    THREE,
    VOCAB,
    B,
    E,
    Step,
    T,
    flops_by_kind,
    policy_of,
    wanted_flops,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from mptrain import Precision, kernels
from mptrain.models import llama
from mptrain.precision.backends.emulated import backend as emulated
from mptrain.precision.backends.emulated import linear as fp8
from mptrain.precision.convert import HOOKS, ConversionReport
from mptrain.telemetry.audit import StepAudit

pytestmark = pytest.mark.usefixtures("one_thread")


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
