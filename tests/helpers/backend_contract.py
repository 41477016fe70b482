"""What every backend must do, as functions of a case: test_backends.py runs them on a CPU, tests/gpu on real kernels.

Their numbers are checked against backend_oracle.py, which shares no code with mptrain.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backend_oracle import oracle, sqnr
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mptrain import Precision, PrecisionPolicy
from mptrain.precision.policy import Scaling

CONF = Path(__file__).resolve().parents[2] / "conf" / "precision"
GEMMS = ("mm", "addmm", "bmm", "_scaled_mm", "linear", "matmul")


@dataclass(frozen=True)
class Case:
    """A policy on a backend and device. ``floor``: least SQNR against the oracle in dB (the result is rounded)."""

    name: str
    policy: PrecisionPolicy
    device: str = "cpu"
    floor: float = 48.0  # a BF16 result of an exact sum: 2^-9 relative, uniform, is some 50 to 56 dB

    @property
    def quantized(self) -> bool:
        return self.policy.quantized

    @property
    def unit(self) -> int:
        """The narrowest layer: what its GEMMs take, twice of it where that is little."""
        return max(32, self.policy.quantization.multiple)

    @property
    def delayed(self) -> bool:
        return self.policy.quantization.scaling is Scaling.delayed


def policy_of(name: str, backend: str = "auto", **quantization: Any) -> PrecisionPolicy:
    """A recipe of conf/precision with another backend or other quantization settings."""
    made = replace(PrecisionPolicy.named(CONF / f"{name}.yaml"), backend=backend)
    return replace(made, quantization=replace(made.quantization, **quantization)) if quantization else made


class Net(nn.Module):
    """Linear layers of several kinds: with a bias and without, tied, frozen, of a width no FP8 GEMM takes, kept."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.first = nn.Linear(unit, 2 * unit)
        self.second = nn.Linear(2 * unit, unit, bias=False)
        self.tied = nn.Linear(unit, 2 * unit, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(2 * unit, unit)
        self.frozen.weight.requires_grad_(False)
        self.odd = nn.Linear(unit, 20)
        self.head = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.relu(self.first(x))))
        x = self.frozen(torch.relu(self.tied(x)))
        return self.head(torch.tanh(self.odd(x))).float()


def net(case: Case, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(case.unit).to(case.device)


def batch(case: Case, index: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs [rows, unit] and random cotangents [rows, 8] for micro-batch ``index``."""
    generator = torch.Generator().manual_seed(1000 + index)
    x, cotangent = torch.randn(rows, case.unit, generator=generator), torch.randn(rows, 8, generator=generator)
    return x.to(case.device), cotangent.to(case.device)


class Run:
    """A few training steps with random cotangents; AdamW without fusing, so that steps are the same everywhere."""

    def __init__(self, case: Case, *, recompute: bool = False) -> None:
        self.case, self.recompute = case, recompute
        self.model = net(case)
        self.precision = Precision(case.policy).prepare(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def step(self, index: int) -> float:
        x, cotangent = batch(self.case, index)
        self.optimizer.zero_grad()
        with self.precision.forward():
            out = self.precision.recompute(self.model, x) if self.recompute else self.model(x)
            loss = (out * cotangent).mean()
        self.precision.backward(loss)
        self.precision.step(self.optimizer)
        return loss.detach().item()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit-equal, tensor by tensor."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def one_layer(case: Case, rows: int, width: int, out: int, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model of one layer without a bias, an input and a cotangent whose values are exact in BF16, FP16 and TF32."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, out, bias=False))
    model[0].weight.data = torch.randn(out, width, generator=generator) * 0.05
    x = torch.randn(rows, width, generator=generator).bfloat16().float()
    cotangent = torch.randn(rows, out, generator=generator).bfloat16().float()
    return model.to(case.device), x.to(case.device), cotangent.to(case.device)


def three_gemms(case: Case, model: nn.Sequential, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Output, grad_input and grad_weight of the prepared layer."""
    precision = Precision(case.policy).prepare(model)
    x = x.clone().requires_grad_()
    with precision.forward():
        y = model(x)
    with precision.backend.backward():
        y.backward(cotangent.to(y.dtype))
    return {"output": y.detach().float(), "grad_input": x.grad.float(), "grad_weight": model[0].weight.grad}


# ---- the contract -----------------------------------------------------------------------------------------------


def check_parameters_are_shared(case: Case) -> None:
    model = net(case)
    before = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    wanted = {name: p.requires_grad for name, p in before.items()}
    Precision(case.policy).prepare(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for name, parameter in after.items():
        assert parameter is before[name], f"{name} was replaced"
        assert parameter.requires_grad == wanted[name], f"{name} lost requires_grad"
        assert parameter.dtype == torch.float32
    assert model.tied.weight is model.first.weight, "the tie is gone"
    assert list(model.state_dict()) == keys, "a checkpoint would look different from FP32's"
    model.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    Run(case).step(0)  # and they train


def check_what_is_converted(case: Case) -> None:
    run = Run(case)
    report = run.precision.report
    if not case.quantized:
        assert report.converted == ()
        return
    assert set(report.converted) == {"first", "second", "tied", "frozen"}, str(report)
    assert f"20x{case.unit} is not divisible by {case.policy.quantization.multiple}" in report.kept["odd"]
    assert report.kept["head"] == "matches precision.keep_default"
    assert type(run.model.odd) is nn.Linear
    assert all(type(run.model.get_submodule(name)) is not nn.Linear for name in report.converted)


def check_keep_is_a_full_match(case: Case) -> None:
    model, width = nn.Module(), case.policy.quantization.multiple
    model.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(22)]).to(case.device)
    report = Precision(replace(case.policy, keep=r"blocks\.2")).prepare(model).report
    assert set(report.kept) == {"blocks.2"}
    assert {"blocks.20", "blocks.21"} <= set(report.converted)


def check_gemms_against_the_oracle(case: Case, rows: int = 64, width: int = 128, out: int = 256) -> dict[str, float]:
    """Each GEMM within the case's floor of the oracle, and a quantized one no better than 45 dB against FP32."""
    model, x, cotangent = one_layer(case, rows, width, out)
    weight = model[0].weight.detach().clone()
    got = three_gemms(case, model, x, cotangent)
    wanted = oracle(x, weight, cotangent, case.policy)
    exact = oracle(x, weight, cotangent, policy_of("fp32"))
    ratios = {name: sqnr(wanted[name], got[name]) for name in wanted}
    for name, ratio in ratios.items():
        assert ratio >= case.floor, f"{case.name} {name}: {ratio:.1f} dB, floor {case.floor}"
        if case.quantized:
            against_fp32 = sqnr(exact[name], got[name])
            assert 20 < against_fp32 < 45, f"{case.name} {name}: {against_fp32:.1f} dB from FP32 is not FP8"
    return ratios


def check_gradients_depend_on_the_cotangent(case: Case) -> None:
    model, x, cotangent = one_layer(case, 32, 2 * case.unit, case.unit)
    state = copy.deepcopy(model)
    first = three_gemms(case, copy.deepcopy(state), x, cotangent)
    other = three_gemms(case, copy.deepcopy(state), x, cotangent.flip(0))
    none = three_gemms(case, copy.deepcopy(state), x, torch.zeros_like(cotangent))
    for name in ("grad_input", "grad_weight"):
        assert not torch.equal(first[name], other[name]), f"{name} ignores grad_output"
        assert none[name].abs().max() == 0, f"{name} of a zero grad_output"


def same_sums(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(table, other[name]) for name, table in one.items())


def check_evaluation_leaves_no_trace(case: Case) -> None:
    """Training with evaluations between the steps is bit for bit training without, and counts nothing more."""
    plain, evaluated = Run(case), Run(case)
    plain.precision.counters.sample()
    evaluated.precision.counters.sample()
    for index in range(3):
        assert plain.step(index) == evaluated.step(index)
        for on in (True, False):
            with evaluated.precision.evaluating(policy_on=on):
                quiet = evaluated.model(batch(case, 90 + index)[0] * 50.0)
        assert not quiet.requires_grad
    assert same(plain.weights(), evaluated.weights())
    assert same_sums(plain.precision.counters.take(), evaluated.precision.counters.take())


def check_bypass_is_fp32(case: Case) -> None:
    run, twin = Run(case), net(case)
    x, _ = batch(case, 0)
    with torch.no_grad():
        wanted = twin(x)
    with run.precision.evaluating(policy_on=False):
        assert torch.equal(run.model(x), wanted), "policy_on=False must run the FP32 masters"
    with run.precision.evaluating():
        assert torch.equal(run.model(x), wanted) == (case.policy.name == "fp32")


def check_recomputation_is_exact(case: Case) -> None:
    """Two steps, so that delayed scaling has rotated: same gradients, same weights, every operand counted once."""
    plain, again = Run(case), Run(case, recompute=True)
    plain.precision.counters.sample()
    again.precision.counters.sample()
    for index in range(3):
        assert plain.step(index) == again.step(index)
        assert same(plain.gradients(), again.gradients()), f"step {index}"
    assert same(plain.weights(), again.weights())
    sums = plain.precision.counters.take()
    assert same_sums(sums, again.precision.counters.take())
    if case.quantized:
        assert (sums["counts"][:, 0] > 0).all(), "an operand was not counted"
        assert torch.equal(sums["histogram"].sum(1), sums["counts"][:, 0]), "every element is in one bin"


def check_state_round_trip(case: Case, other: Case | None = None) -> None:
    """Saved after 3 steps and loaded into a new run: its next 5 steps are bit-equal to those of the run saved."""
    run = Run(case)
    for index in range(3):
        run.step(index)
    fp8 = run.precision.state_dict()
    assert all(isinstance(v, Tensor) for part in fp8.values() for v in part.values())
    assert bool(fp8["fp8"]) == case.delayed
    loaded = Run(other or case)
    loaded.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    loaded.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    loaded.precision.load_state_dict(copy.deepcopy(fp8))
    for index in range(3, 8):
        went_on, resumed = run.step(index), loaded.step(index)
        if other is None:
            assert went_on == resumed, f"step {index}"
        else:
            assert abs(went_on - resumed) < 0.01, f"step {index}: {went_on} and {resumed}"
    if other is None:
        assert same(run.weights(), loaded.weights())


def check_delayed_trace(case: Case) -> None:
    """A table of amaxes against the rule: scale = max / (amax of the last 3) / 2^margin, unless that is 0 or Inf."""
    config = replace(case.policy.quantization, history=3, margin=1)
    policy = replace(case.policy, quantization=config)
    model, x, cotangent = one_layer(case, 32, 2 * case.unit, case.unit)
    precision = Precision(policy).prepare(model)
    x, cotangent = x / x.abs().max(), cotangent / cotangent.abs().max()
    seen: list[float] = []
    expected = 1.0
    for amax in (1.0, 8.0, 2.0, 4.0, 0.5, float("inf"), 0.25, 0.0, 0.0, 0.0, 16.0):
        with precision.forward():
            y = model(x * amax if amax != float("inf") else x.clone().index_fill(1, torch.tensor(0).to(x.device), amax))
        y.backward((cotangent * (amax if amax != float("inf") else 0.0)).to(y.dtype))
        seen.append(amax if amax != float("inf") else 0.0)
        largest = max(seen[-3:])
        if largest > 0 and amax != float("inf"):
            expected = 448.0 / largest / 2.0
        state = precision.state_dict()["fp8"]
        assert state["0/input/scale"].item() == np.float32(expected), f"after {amax}"
        wanted = [*reversed(seen[-3:]), 0.0, 0.0][:3]
        assert state["0/input/history"].tolist() == wanted, f"after {amax}: newest first"
        assert state["0/grad_output/history"].tolist() == wanted, f"after {amax}"
    precision.state_dict()
    assert precision.state_dict()["fp8"]["0/input/history"].tolist() == [16.0, 0.0, 0.0], "it rotated without a forward"


def check_counts(case: Case) -> None:
    """Counts of a sampled step against the definitions: elements, and underflow of values planted in grad_output."""
    model, x, cotangent = one_layer(case, 32, 2 * case.unit, case.unit)
    tiny = 2.0**-40
    cotangent[:, :5] = tiny  # beside values near 1, far below the smallest subnormal of E5M2 at any scale
    cotangent[0, 0] = 0.0
    precision = Precision(case.policy).prepare(model)
    precision.counters.sample()
    with precision.forward():
        y = model(x)
    y.backward(cotangent.to(y.dtype))
    counts = dict(zip(precision.counters.slots, precision.counters.take()["counts"].tolist(), strict=True))
    assert counts["0", "input"][0] == x.numel()
    assert counts["0", "weight"][0] == 2 * case.unit * case.unit
    assert counts["0", "grad_output"][0] == cotangent.numel()
    assert counts["0", "grad_output"][2] == 32 * 5 - 1, "zeros are not underflow, tiny values are"
    assert all(row[1] == row[3] == row[4] == 0 for row in counts.values())
    amax = dict(zip(precision.counters.slots, precision.counters.amax.tolist(), strict=True))
    assert amax["0", "input"] == float(x.abs().max())
    assert amax["0", "grad_output"] == float(cotangent.abs().max())


class Matmuls(TorchDispatchMode):
    """Records the operand dtypes of every matrix product; of a float8 tensor subclass, its 8-bit data's."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in GEMMS:
            tensors = [a for a in args if isinstance(a, Tensor)][1 if name == "addmm" else 0 :][:2]
            self.dtypes.append(tuple(getattr(t, "_data", t).dtype for t in tensors))
        return func(*args, **(kwargs or {}))


def matmul_dtypes(case: Case) -> list[tuple[torch.dtype, ...]]:
    """Operand dtypes of the matrix products of one layer's forward and backward, in order."""
    model, x, cotangent = one_layer(case, 32, 2 * case.unit, case.unit)
    with Matmuls() as record:
        three_gemms(case, model, x, cotangent)
    return record.dtypes
