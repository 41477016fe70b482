"""The contract of backend_contract.py for every backend that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.register_assert_rewrite("backend_contract")

import backend_contract as contract  # noqa: E402
from backend_contract import Case, policy_of  # noqa: E402

from mptrain import Precision  # noqa: E402
from mptrain.formats import Format  # noqa: E402
from mptrain.precision import backends  # noqa: E402
from mptrain.precision.backends.emulated.gemm import carrier_dtype  # noqa: E402
from mptrain.precision.policy import Scaling  # noqa: E402

CASES = [
    Case("autocast-fp32", policy_of("fp32"), floor=120.0),
    Case("autocast-bf16", policy_of("bf16")),
    Case("emulated-fp16", policy_of("fp16"), floor=66.0),
    Case("emulated-tf32", policy_of("tf32"), floor=120.0),
    Case("emulated-fp8", policy_of("fp8", "emulated")),
    Case("emulated-fp8-e4m3", policy_of("fp8", "emulated", backward=Format.fp8_e4m3)),
    Case("emulated-fp8-delayed", policy_of("fp8-delayed", "emulated", history=4)),
    Case("emulated-fp8-rowwise", policy_of("fp8-rowwise", "emulated")),
    Case("emulated-fp8-rowwise-hybrid", policy_of("fp8", "emulated", scaling=Scaling.rowwise)),
    Case("emulated-fp8-block", policy_of("fp8-block", "emulated")),
    Case("native-fp8", policy_of("fp8", "native")),
    Case("native-fp8-rowwise", policy_of("fp8", "native", scaling=Scaling.rowwise)),
]
QUANTIZED = [case for case in CASES if case.quantized]
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
QUANTIZED_CHECKS = [contract.check_keep_is_a_full_match, contract.check_counts]
CPU = torch.device("cpu")


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Case) else getattr(value, "__name__", None)


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_contract(case: Case, check: Callable[[Case], object]) -> None:
    check(case)


@pytest.mark.parametrize("check", QUANTIZED_CHECKS, ids=name_of)
@pytest.mark.parametrize("case", QUANTIZED, ids=name_of)
def test_contract_of_quantized_backends(case: Case, check: Callable[[Case], object]) -> None:
    check(case)


def test_delayed_scales_follow_the_rule() -> None:
    contract.check_delayed_trace(next(case for case in QUANTIZED if case.delayed))


def test_dtypes_of_plain_matrix_products() -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)):
        record = contract.matmul_dtypes(Case(name, policy_of(name)))
        assert record == [(dtype, dtype)] * 3, name


def test_emulated_fp8_runs_in_its_carrier() -> None:
    carrier = carrier_dtype("cpu")
    for name in ("fp8", "fp8-rowwise", "fp8-block"):
        assert contract.matmul_dtypes(Case(name, policy_of(name, "emulated"))) == [(carrier, carrier)] * 3


@pytest.mark.parametrize("backward", [Format.fp8_e4m3, Format.fp8_e5m2], ids=str)
@pytest.mark.parametrize("scaling", [Scaling.current, Scaling.rowwise])
def test_the_emulation_is_torchao_s_numerics(scaling: Scaling, backward: Format) -> None:
    """Up to the order of FP32 sums before they become BF16: a last bit here and there."""
    got = {}
    for backend in ("emulated", "native"):
        case = Case(backend, policy_of("fp8", backend, scaling=scaling, backward=backward))
        got[backend] = contract.three_gemms(case, *contract.one_layer(case, 200, 256, 384))
    for name, value in got["native"].items():
        assert contract.sqnr(value, got["emulated"][name]) > 70, name


@pytest.mark.parametrize("scaling", [Scaling.current, Scaling.rowwise])
def test_native_formats_are_those_asked(scaling: Scaling) -> None:
    """HYBRID stays HYBRID: a cast shared by three roles would make grad_output E4M3 without a word."""
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    hybrid = contract.matmul_dtypes(Case("hybrid", policy_of("fp8", "native", scaling=scaling)))
    assert [pair for pair in hybrid if pair[0] != torch.float32] == [(e4m3, e4m3), (e5m2, e4m3), (e5m2, e4m3)]
    policy = policy_of("fp8", "native", scaling=scaling, backward=Format.fp8_e4m3)
    narrow = contract.matmul_dtypes(Case("e4m3", policy))
    assert [pair for pair in narrow if pair[0] != torch.float32] == [(e4m3, e4m3)] * 3


def test_native_on_a_cpu_says_that_it_is_emulated() -> None:
    precision = Precision(policy_of("fp8", "native")).prepare(contract.net(QUANTIZED[0]))
    assert precision.backend.emulated
    assert "FP32 GEMMs" in precision.backend.carrier
    assert "torchao" in precision.backend.carrier


@pytest.mark.parametrize(
    ("policy", "works"),
    [
        (policy_of("fp8", "te"), "precision.backend=emulated"),
        (policy_of("fp8-delayed", "te"), "precision.backend=emulated"),
        (policy_of("bf16", "te"), "precision.backend=autocast"),
        (policy_of("fp8-delayed", "native"), "precision.quantization.scaling=current"),
        (policy_of("fp8", "native", scaling=Scaling.block), "precision.quantization.scaling=current"),
        (policy_of("fp8", "native", margin=1), "precision.quantization.margin=0"),
        (policy_of("bf16", "native"), "precision.backend=autocast"),
        (policy_of("bf16", "emulated"), "precision.backend=autocast"),
        (policy_of("fp8", "autocast"), "precision.backend=auto"),
        (policy_of("tf32", "autocast"), "precision.backend=emulated"),
    ],
    ids=lambda value: f"{value.name}-{value.backend}" if hasattr(value, "backend") else None,
)
def test_a_missing_backend_names_the_setting_that_works(policy: contract.PrecisionPolicy, works: str) -> None:
    with pytest.raises(ValueError, match=works.replace(".", r"\.")) as raised:
        backends.resolve(policy, CPU)
    assert f"precision.backend={policy.backend} cannot run precision={policy.name}" in str(raised.value)


def test_auto_takes_no_slow_backend() -> None:
    for name in ("fp8", "fp8-delayed", "fp8-rowwise", "fp8-block", "fp16", "tf32"):
        assert backends.resolve(policy_of(name), CPU).name == "emulated"
    for name in ("fp32", "bf16"):
        assert backends.resolve(policy_of(name), CPU).name == "autocast"


def test_native_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "mptrain\[native\]"'):
        backends.resolve(policy_of("fp8", "native"), CPU)


def test_a_checkpoint_crosses_backends() -> None:
    """Weights and scales of a run on one backend go on under another; what has no meaning there is ignored."""
    delayed, current = policy_of("fp8-delayed", "emulated", history=4), policy_of("fp8", "native")
    contract.check_state_round_trip(Case("to-native", delayed), Case("native", current))
    contract.check_state_round_trip(Case("to-bf16", delayed), Case("bf16", policy_of("bf16")))
    run = contract.Run(Case("from-bf16", policy_of("bf16")))
    run.step(0)
    resumed = contract.Run(Case("delayed", delayed))
    resumed.precision.load_state_dict(run.precision.state_dict())
    resumed.step(1)
    names = {key.rsplit("/", 1)[0] for key in resumed.precision.state_dict()["fp8"]}
    assert names == {f"{layer}/{role}" for layer, role in resumed.precision.counters.slots}


def test_every_backend_is_under_contract() -> None:
    """Each name of the registry is run here, or on a GPU by tests/gpu."""
    run_here = {backends.resolve(case.policy, CPU).name for case in CASES}
    assert run_here | {"te"} == {backend.name for backend in backends.all_backends()}


def test_a_policy_without_backend_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation has every policy, so this is for a build without it."""
    present = [backend for backend in backends.all_backends() if backend.name != "emulated"]
    monkeypatch.setattr(backends, "all_backends", lambda: present)
    with pytest.raises(ValueError, match=r"precision=fp8-block on cpu\. te: .*; native: .*; autocast: "):
        backends.resolve(policy_of("fp8-block"), CPU)
