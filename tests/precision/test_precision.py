"""The verbs of Precision on a toy model: what a bad step leaves behind, and what a good one does to the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mptrain import LossScale, Precision, PrecisionPolicy, ScaleEvent, models
from mptrain.distributed import ALONE, Ranks
from mptrain.precision.outcome import Blame
from mptrain.precision.policy import LossScaleKind, conf_dir

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(path.stem for path in (conf_dir() / "precision").glob("*.yaml"))
QUANTIZED = [name for name in NAMES if PrecisionPolicy.named(name).quantized]
OPTIMIZERS = {
    "adamw": lambda parameters, fused: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=fused),
    "sgd": lambda parameters, fused: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused),
}
BAD = {"Inf": math.inf, "-Inf": -math.inf, "NaN": math.nan}


def toy(seed: int = 0, width: int = 32, out: int = 16) -> nn.Sequential:
    """Three layers that FP8 GEMMs take; without biases, whose gradients are not quantized and would show an Inf."""
    torch.manual_seed(seed)
    first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(width, out, bias=False))


class Loop:
    """A toy model in a precision with an optimizer. ``policy``: a name or a policy."""

    def __init__(
        self, policy: str | PrecisionPolicy, optimizer: str = "adamw", *, fused: bool = True, ranks: Ranks = ALONE
    ) -> None:
        self.precision = Precision(policy, ranks=ranks)
        multiple = self.precision.policy.quantization.multiple
        self.width, self.out = max(32, multiple), multiple
        self.model = toy(width=self.width, out=self.out)
        self.precision.prepare(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), fused)

    def gradients(self, index: int, *, x: Tensor | None = None, hook: Callable[[Tensor], Tensor] | None = None) -> None:
        """Forward and backward of batch ``index`` (or of ``x``); ``hook`` changes the gradient of the output."""
        generator = torch.Generator().manual_seed(index)
        drawn = torch.randn(16, self.width, generator=generator)
        cotangent = torch.randn(16, self.out, generator=generator)
        with self.precision.forward():
            y = self.model(drawn if x is None else x)
            if hook is not None:
                y.register_hook(hook)
            loss = (y.float() * cotangent).mean()
        self.precision.backward(loss)

    def step(self, index: int, clip: float = 0.0):
        self.gradients(index)
        outcome = self.precision.step(self.optimizer, clip=clip)
        self.optimizer.zero_grad()
        return outcome.read()

    def everything(self) -> dict[str, Tensor]:
        """Weights and optimizer state, as they are now."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"{name}/{key}": value.clone() for key, value in moments.items()}
        return state


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# ---- found_inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient_skips_the_step_and_leaves_no_trace(name, optimizer, fused):
    """One element of one gradient, clipping on (which would turn Inf into NaN and 0): nothing moves, and the steps
    after it are bit for bit those of a twin that only threw the gradients away.
    """
    run, twin = Loop(name, optimizer, fused=fused), Loop(name, optimizer, fused=fused)
    assert run.step(0, clip=1.0) == twin.step(0, clip=1.0)
    for index, (kind, value) in enumerate(BAD.items(), start=1):
        before = run.everything()
        run.gradients(index)
        run.model[2].weight.grad[3, 5] = value
        outcome = run.precision.step(run.optimizer, clip=1.0)
        run.optimizer.zero_grad()
        assert_equal(run.everything(), before)
        assert not outcome.applied
        record = outcome.read()
        assert record.reason == f"{kind.strip('-')} in the gradient of weight"
        assert (record.blame.layer, record.blame.role) == ("2", "grad_weight")
        assert not math.isfinite(record.grad_norm)
        twin.gradients(index)
        twin.optimizer.zero_grad()
    for loop in (run, twin):  # the scale of FP16 did move; everything else must not have
        loop.precision.scaler.load_state_dict(Loop(name).precision.scaler.state_dict())
    for index in range(4, 7):
        ours, theirs = run.step(index, clip=1.0), twin.step(index, clip=1.0)
        assert ours.applied
        assert ours == theirs
    assert_equal(run.everything(), twin.everything())


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        ("adamw", True),
        ("adamw", False),
        ("sgd", False),
        ("sgd", True),
    ],
)
def test_a_first_step_that_is_skipped_leaves_no_trace(optimizer, fused):
    """FP16's first steps often are. A fused kernel told to skip must not leave state behind that it never wrote."""
    run, fresh = Loop("fp32", optimizer, fused=fused), Loop("fp32", optimizer, fused=fused)
    run.gradients(0)
    run.model[0].weight.grad[0, 0] = math.inf
    trash = [torch.full_like(p, 1e30) for p in run.model.parameters()]  # what uninitialized memory may hold
    del trash
    assert not run.precision.step(run.optimizer).applied
    run.optimizer.zero_grad()
    for index in (1, 2):
        assert run.step(index) == fresh.step(index)
    assert_equal(run.everything(), fresh.everything())


def test_the_first_bad_layer_is_named_and_the_others_are_counted():
    loop = Loop("bf16")
    loop.gradients(0)
    loop.model[2].weight.grad[0, 0] = math.inf
    loop.model[3].weight.grad.fill_(math.nan)
    record = loop.precision.step(loop.optimizer).read()
    assert (record.reason, record.blame.layer) == ("NaN in the gradient of weight and 1 more", "3")


@pytest.mark.parametrize(
    "size",
    [3e38, 1.5e19],
    ids=["one-tensor", "all-together"],
)
@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_finite_gradients_whose_norm_leaves_fp32_are_skipped(name, size):
    loop = Loop(name)
    loop.step(0)
    loop.gradients(1)
    for parameter in loop.model.parameters():
        parameter.grad[0, 0] = size
    before = loop.everything()
    record = loop.precision.step(loop.optimizer, clip=1.0).read()
    assert not record.applied
    assert "the norm of all gradients overflows FP32" in record.reason
    assert_equal(loop.everything(), before)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_operand_that_the_cast_would_hide(name, value, fused):
    """E4M3 has no Inf and saturates: every gradient is finite (asserted), and still the step is skipped."""
    loop = Loop(name, fused=fused)
    loop.step(0)
    before = loop.everything()
    x = torch.randn(16, loop.width, generator=torch.Generator().manual_seed(1))
    x[4, 7] = value
    loop.gradients(1, x=x)
    if not math.isnan(value):
        assert all(bool(p.grad.isfinite().all()) for p in loop.model.parameters()), "the cast did not hide it"
    record = loop.precision.step(loop.optimizer, clip=1.0).read()
    kind = "NaN" if math.isnan(value) else "Inf"
    assert not record.applied
    assert record.blame == Blame(f"{kind} in input (forward of micro-batch 0)", "0", "input", kind, "forward", 0)
    assert_equal(loop.everything(), before)
    loop.optimizer.zero_grad()
    assert loop.step(2).applied, "the flag of one step must not skip the next"


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_grad_output_and_a_bad_weight(name):
    def plant(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[2, 3] = math.inf
        return grad

    loop = Loop(name)
    loop.gradients(0, hook=plant)
    assert all(bool(p.grad.isfinite().all()) for p in loop.model.parameters()), "the cast did not hide it"
    record = loop.precision.step(loop.optimizer).read()
    assert (record.applied, record.blame.layer, record.blame.role) == (False, "3", "grad_output")
    loop.optimizer.zero_grad()
    with torch.no_grad():
        loop.model[2].weight[1, 1] = math.inf
    loop.gradients(1)
    record = loop.precision.step(loop.optimizer).read()
    assert (record.applied, record.blame.layer, record.blame.role) == (False, "2", "weight")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_micro_batch_among_good_ones_skips_the_step(name, bad):
    loop = Loop(name)
    for micro in range(3):
        x = torch.randn(16, loop.width, generator=torch.Generator().manual_seed(micro))
        x[0, 0] = math.inf if micro == bad else 1.0
        loop.gradients(micro, x=x)
    assert not loop.precision.step(loop.optimizer).applied


def test_overflows_lower_the_scale_and_training_goes_on():
    """A scale far too large: FP16 skips, backs off, and applies once the scaled gradients fit."""
    scale = LossScale(kind=LossScaleKind.dynamic, init=2.0**40, hysteresis=1)
    loop = Loop(replace(PrecisionPolicy.named("fp16"), loss_scale=scale))
    records = [loop.step(0) for _ in range(60)]
    skips = [record.applied for record in records].index(True)
    assert 5 < skips < 40
    assert [record.event for record in records[:skips]] == [ScaleEvent.backed_off] * skips
    assert [record.scale for record in records[: skips + 1]] == [2.0 ** (40 - n) for n in range(skips + 1)]
    later = [record.applied for record in records[skips:]]
    assert sum(later) > 30
    assert loop.precision.scaler.scale.item() == 2.0 ** (40 - skips - later.count(False)), "each skip, and no more"


# ---- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_and_unfused_agree_with_plain_torch(optimizer, clip, scaled):
    """Scale and clip factor as the divisor of a fused kernel, or as a pass of our own: plain torch's weights."""
    kind = LossScaleKind.dynamic if scaled else LossScaleKind.none
    policy = PrecisionPolicy(loss_scale=LossScale(kind=kind, init=2.0**13, interval=3))
    fused, unfused = Loop(policy, optimizer, fused=True), Loop(policy, optimizer, fused=False)
    plain, start = Loop("fp32", optimizer, fused=False), Loop("fp32").everything()
    for index in range(10):
        plain.gradients(index)
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip or math.inf).item()
        assert not clip or norm > 1.5 * clip, "clipping would do nothing"
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        for loop in (fused, unfused):
            record = loop.step(index, clip)
            assert record.applied
            assert record.grad_norm == pytest.approx(norm, rel=1e-4), "the norm is told unscaled and unclipped"
    for name, expected in plain.model.state_dict().items():
        moved = (expected - start[name]).abs().max().item()
        for loop in (fused, unfused):
            off = (loop.model.state_dict()[name] - expected).abs().max().item()
            assert off < 2e-3 * moved, f"{name}: {off:.1e} off after a move of {moved:.1e}"
    assert fused.precision.scaler.scale.item() == (2.0**16 if scaled else 1.0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "fp8"])
@pytest.mark.parametrize("clip", [1e-3, 0.01, 1e3])
def test_clip_is_clip_grad_norm(name, clip, fused):
    """SGD with a rate of 1 from weights of 0 shows the clipped gradient itself; 1e3 is above the norm: no clipping."""
    loop, reference = Loop(name), Loop(name)
    loop.gradients(0)
    reference.gradients(0)
    scale = reference.precision.scaler.scale
    for parameter in reference.model.parameters():
        parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(reference.model.parameters(), clip)
    expected = [parameter.grad.clone() for parameter in reference.model.parameters()]
    assert 0.011 < norm < 100
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.zero_()
    record = loop.precision.step(torch.optim.SGD(loop.model.parameters(), lr=1.0, fused=fused), clip=clip).read()
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for parameter, gradient in zip(loop.model.parameters(), expected, strict=True):
        torch.testing.assert_close(-parameter.detach(), gradient, rtol=2e-4, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_updates_below_a_bf16_ulp_are_kept(name):
    """512 updates of 2^-12 on weights of 1: an eighth in all, and none of it in BF16, whose ulp below 1 is 2^-8."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    nn.init.ones_(model[0].weight)
    pure = copy.deepcopy(model).bfloat16()
    precision = Precision(name).prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-12, fused=True)
    applied = attempts = 0
    while applied < 512:
        attempts += 1
        assert attempts < 600, "the loss scale never fits"
        with precision.forward():
            loss = model(torch.ones(16, 16)).float().mean(0).sum()
        precision.backward(loss)
        applied += precision.step(optimizer).applied  # FP16 first finds a scale that fits
        optimizer.zero_grad()
    optimizer = torch.optim.SGD(pure.parameters(), lr=2.0**-12, fused=True)
    for _ in range(512):
        pure(torch.ones(16, 16, dtype=torch.bfloat16)).mean(0).sum().backward()
        assert bool((pure[0].weight.grad == 1).all())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight, torch.full((16, 16), 0.875))
    assert torch.equal(pure[0].weight, torch.ones(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_draws_the_same_dropout_and_adds_the_same_gradients(name):
    """A GPT with dropout, two micro-batches a step, two steps: bit-equal gradients, with the forwards run again."""
    module = models.load("gpt")
    sizes = module.Config(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
    seen = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = module.build(sizes)
        calls = [0]
        model.blocks[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        precision = Precision(name).prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        if recompute:
            model.recompute = precision.recompute
        for step in range(2):
            for micro in range(2):
                tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(2 * step + micro))
                with precision.forward():
                    loss = model(tokens[:, :-1], tokens[:, 1:])
                precision.backward(loss)
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            assert precision.step(optimizer, clip=1.0).applied
            optimizer.zero_grad()
        assert calls == [8 if recompute else 4], "recomputation did not happen, or happened without being asked for"
        seen.append(gradients | dict(model.state_dict()))
    assert_equal(*seen)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_parameter_that_is_no_master_weight_is_refused(name, dtype):
    model = toy()
    model[2].to(dtype)
    with pytest.raises(ValueError, match=rf"2\.weight is {dtype}: .* call model\.float\(\) first"):
        Precision(name).prepare(model)
    assert type(model[0]) is nn.Linear, "refused, yet half converted"


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Tanh(), toy().requires_grad_(False)], ids=["", "tanh", "frozen"])
def test_a_model_without_anything_to_train_is_refused(model):
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Precision("fp8").prepare(model)


def test_a_step_without_gradients_is_refused():
    loop = Loop("bf16")
    with pytest.raises(ValueError, match=r"call precision\.backward\(loss\) first"):
        loop.precision.step(loop.optimizer)


def test_a_recipe_by_path(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\ncompute: bf16\nquantization: {scaling: current, margin: 1}\nkeep: '[23]'\n")
    for path in (recipe, str(recipe)):
        precision = Precision(path).prepare(toy())
        assert precision.policy.name == "mine"
        assert precision.report.converted == ("0",)
        assert precision.report.kept == dict.fromkeys(("2", "3"), "matches precision.keep")
    assert Precision("fp8").prepare(toy()).report.converted == ("0", "2", "3")


@pytest.mark.parametrize(("wrong", "near"), [("fp8-delaid", "fp8-delayed"), ("bf61", "bf16"), ("FP16", "fp16")])
def test_an_unknown_name_gets_the_nearest(wrong, near):
    with pytest.raises(ValueError, match="unknown precision") as raised:
        Precision(wrong)
    assert f"{wrong!r}: did you mean {near!r}?" in str(raised.value)
    assert all(name in str(raised.value) for name in NAMES)


def test_a_recipe_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no precision recipe at nowhere/mine\.yaml"):
        Precision("nowhere/mine.yaml")
