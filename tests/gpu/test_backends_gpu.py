"""The backend contract on real kernels, and the kernels against each other on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.register_assert_rewrite("backend_contract")

import backend_contract as contract  # noqa: E402
from backend_contract import Case, policy_of  # noqa: E402

from mptrain import Precision, kernels  # noqa: E402
from mptrain.formats import Format  # noqa: E402
from mptrain.models import gpt  # noqa: E402
from mptrain.precision import backends  # noqa: E402
from mptrain.precision.policy import Scaling  # noqa: E402

CUDA = torch.device("cuda")
NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU here"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")]


def cuda_case(name: str, recipe: str, backend: str = "auto", floor: float = 46.0, **quantization: object) -> object:
    """A case on the GPU, marked te where it needs TE and skipped with the reason where its backend is missing."""
    case = Case(name, policy_of(recipe, backend, **quantization), device="cuda", floor=floor)
    reason = NO_GPU
    if not reason and backend != "auto":
        reason = backends.load(backend).missing(case.policy, CUDA, auto=False) or ""
    marks = [pytest.mark.te] if backend == "te" else []
    if reason:
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(case, id=name, marks=marks)


QUANTIZED = [
    cuda_case("emulated-fp8", "fp8", "emulated"),
    cuda_case("emulated-fp8-delayed", "fp8-delayed", "emulated", history=4),
    cuda_case("native-fp8", "fp8", "native"),
    cuda_case("native-fp8-rowwise", "fp8", "native", scaling=Scaling.rowwise),
    cuda_case("te-fp8", "fp8", "te"),
    cuda_case("te-fp8-e4m3", "fp8", "te", backward=Format.fp8_e4m3),
    cuda_case("te-fp8-delayed", "fp8-delayed", "te", history=4),
]
BLOCK = cuda_case("te-fp8-block", "fp8", "te", scaling=Scaling.block, backward=Format.fp8_e4m3)
# A TF32 unit cuts the operands' low bits where the oracle rounds them: up to 2^-10 instead of 2^-11 of error.
PLAIN = [
    cuda_case("autocast-fp32", "fp32", floor=110.0),
    cuda_case("autocast-tf32", "tf32", "autocast", floor=55.0),
    cuda_case("autocast-bf16", "bf16"),
    cuda_case("autocast-fp16", "fp16", floor=60.0),
]
FINE = [
    cuda_case("emulated-fp8-rowwise", "fp8-rowwise", "emulated"),
    cuda_case("emulated-fp8-block", "fp8-block", "emulated"),
]
KERNELS = QUANTIZED[2:]
CHECKS = [
    contract.check_parameters_are_shared,
    contract.check_what_is_converted,
    contract.check_gemms_against_the_oracle,
    contract.check_gradients_depend_on_the_cotangent,
    contract.check_evaluation_leaves_no_trace,
    contract.check_bypass_is_fp32,
    contract.check_recomputation_is_exact,
    contract.check_state_round_trip,
]


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """The TF32 switches are the process's: leave them as FP32 wants them."""
    yield
    Precision(policy_of("fp32")).prepare(nn.Linear(1, 1).cuda()).forward()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", PLAIN + QUANTIZED + FINE)
def test_contract(case: Case, check: Callable[[Case], object]) -> None:
    check(case)


@pytest.mark.parametrize("check", [contract.check_keep_is_a_full_match, contract.check_counts])
@pytest.mark.parametrize("case", QUANTIZED + FINE)
def test_contract_of_quantized_backends(case: Case, check: Callable[[Case], object]) -> None:
    check(case)


@pytest.mark.parametrize("case", [QUANTIZED[1], QUANTIZED[6]])
def test_delayed_scales_follow_the_rule(case: Case) -> None:
    contract.check_delayed_trace(case)


@pytest.mark.parametrize("case", [BLOCK])
def test_block_scaling_against_the_oracle(case: Case) -> None:
    contract.check_gemms_against_the_oracle(case, rows=256, width=256, out=384)


@pytest.mark.parametrize("case", [*KERNELS, BLOCK])
def test_kernels_against_the_emulation(case: Case) -> None:
    """Same inputs, random cotangents: how far real kernels are from their twin. Shown with ``-s``, bounded here."""
    twin = replace(case, policy=replace(case.policy, backend=policy_of("fp8", "emulated").backend))
    got = contract.three_gemms(case, *contract.one_layer(case, 512, 768, 2304))
    wanted = contract.three_gemms(twin, *contract.one_layer(twin, 512, 768, 2304))
    for name, value in wanted.items():
        ratio = contract.sqnr(value, got[name])
        equal = (value == got[name]).float().mean().item()
        print(f"{case.name} {name}: {ratio:.1f} dB, {equal:.1%} of elements bit-equal")
        assert ratio > 45, name
        assert equal > 0.5, name


def test_scaled_mm_against_the_emulation() -> None:
    """``torch._scaled_mm`` on our codes is the emulated GEMM up to the order of its sums."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 units (compute capability 8.9)")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 768, generator=generator).cuda() for n in (512, 2304))
    (a8, a_scale), (b8, b_scale) = (_codes(x) for x in (a, b))
    got = torch._scaled_mm(
        a8, b8.t(), scale_a=1 / a_scale, scale_b=1 / b_scale, out_dtype=torch.bfloat16, use_fast_accum=False
    )
    exact = (a8.double() / a_scale.double()) @ (b8.double() / b_scale.double()).t()
    wanted = exact.bfloat16()
    equal = (wanted == got).float().mean().item()
    print(f"_scaled_mm: {contract.sqnr(exact, got.float()):.1f} dB, {equal:.1%} of elements bit-equal")
    assert contract.sqnr(wanted.float(), got.float()) > 60
    assert equal > 0.9


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = kernels.current_scale(kernels.amax(x), Format.fp8_e4m3)
    return kernels.quantize(x, scale, Format.fp8_e4m3)[0], scale


@pytest.mark.parametrize("case", KERNELS)
def test_a_ragged_microbatch_is_refused_with_a_setting(case: Case) -> None:
    model, x, _ = contract.one_layer(case, 12, 64, 32)
    precision = Precision(case.policy).prepare(model)
    with (
        pytest.raises(ValueError, match=r"12: choose trainer\.batch_size times model\.block_size"),
        precision.forward(),
    ):
        model(x)


def training_losses(case: Case, steps: int = 200) -> list[float]:
    """A tiny GPT on arithmetic sequences modulo 64; checks that the masters stay the very same parameters."""
    torch.manual_seed(0)
    config = gpt.Config(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=128)
    model = gpt.build(config).to(case.device)
    masters = dict(model.named_parameters())
    precision = Precision(case.policy).prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=case.device == "cuda")
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        first = torch.randint(0, 64, (16, 1), generator=generator)
        stride = torch.randint(1, 4, (16, 1), generator=generator)
        tokens = ((first + stride * torch.arange(65)) % 64).to(case.device)
        with precision.forward():
            loss = model(tokens[:, :-1], tokens[:, 1:])
        precision.backward(loss)
        precision.step(optimizer, clip=1.0)
        optimizer.zero_grad()
        losses.append(loss.detach())
    after = dict(model.named_parameters())
    assert list(after) == list(masters)
    assert all(after[name] is parameter for name, parameter in masters.items())
    return torch.stack(losses).tolist()


@pytest.fixture(scope="module")
def fp32_losses() -> list[float]:
    return training_losses(Case("fp32", policy_of("fp32"), device="cuda"))


@pytest.mark.parametrize("case", PLAIN[1:] + QUANTIZED + FINE + [BLOCK])
def test_200_steps_beside_fp32(case: Case, fp32_losses: list[float]) -> None:
    losses = training_losses(case)
    mine, reference = (sum(tail[-20:]) / 20 for tail in (losses, fp32_losses))
    print(f"{case.name}: {mine:.4f} nats after 200 steps, FP32 {reference:.4f}")
    assert mine < 0.7 * losses[0], "it did not learn"
    assert abs(mine - reference) < 0.05 * reference + 0.02


@pytest.mark.te
def test_delayed_state_crosses_te_and_the_emulation() -> None:
    te = Case("te", policy_of("fp8-delayed", "te", history=4), device="cuda")
    reason = backends.load("te").missing(te.policy, CUDA, auto=False)
    if reason:
        pytest.skip(reason)
    emulated = Case("emulated", policy_of("fp8-delayed", "emulated", history=4), device="cuda")
    contract.check_state_round_trip(te, emulated)
    contract.check_state_round_trip(emulated, te)
    states = []
    for case in (te, emulated):  # and from the same weights both come to the same amaxes and scales by themselves
        run = contract.Run(case)
        run.step(0)
        states.append(run.precision.state_dict()["fp8"])
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0.15, atol=0.0, msg=key)  # E5M2 has 2 mantissa bits


@pytest.mark.te
def test_te_leaves_scales_and_formats_to_us() -> None:
    case = Case("te", policy_of("fp8-delayed", "te", history=4), device="cuda")
    reason = backends.load("te").missing(case.policy, CUDA, auto=False)
    if reason:
        pytest.skip(reason)
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    run = contract.Run(case)
    for index in range(2):
        run.step(index)
    manager = getattr(
        FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager
    )  # an instance in newer versions
    held = manager.global_amax_buffer
    assert not any(held.values()), "TE would renew scales behind our back"
    first = run.model.first
    names = [str(first.quantizers[key][index].dtype) for key, index in (("scaling_fwd", 0), ("scaling_bwd", 0))]
    assert "E4M3" in names[0]
    assert "E5M2" in names[1]
