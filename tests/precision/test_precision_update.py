"""The optimizer's step of a precision, and what is refused: against plain torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_loops import NAMES, OPTIMIZERS, Loop, assert_equal, toy
from torch import nn

from mptrain import LossScale, Precision, PrecisionPolicy, models
from mptrain.precision.policy import LossScaleKind

pytestmark = pytest.mark.usefixtures("one_thread")


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
