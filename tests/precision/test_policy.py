"""Policies: every recipe is one, what cannot work is refused by the name of its setting, and plain data holds all."""

import dataclasses
import json
import math
import pickle

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain import Format, LossScale, LossScaler, PrecisionPolicy, Quantization
from mptrain.precision.policy import COMPUTE_FORMATS, FP8_FORMATS, LossScaleKind, Scaling, conf_dir
from mptrain.tools.settings import to_plain

RECIPES = sorted((conf_dir() / "precision").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_its_file_and_prints_its_formats(path):
    policy = PrecisionPolicy.named(path.stem)
    written = yaml.safe_load(path.read_text())
    assert policy.name == path.stem == written["name"]
    assert policy == PrecisionPolicy.named(path) == PrecisionPolicy.from_dict(written)
    plain = to_plain(policy)
    for key, value in written.items():  # every value of the file arrived
        assert plain[key] == (plain[key] | value if isinstance(value, dict) else value)
    said = str(policy) + policy.flow
    formats = {plain["compute"], plain["reduce"], "fp32"}
    if "quantization" in written:
        formats |= {written["quantization"]["forward"], written["quantization"]["backward"]}
    for wanted in formats:
        assert wanted in policy.flow
        assert wanted in said
    absent = {fmt.name for fmt in FP8_FORMATS} - formats
    assert not any(name in policy.flow for name in absent), "the flow tells of a format that the recipe has not"
    assert len(policy.flow.splitlines()) == 3


def test_the_flow_tells_the_loss_scale_and_the_scaling():
    assert "dynamic loss scale 65536" in PrecisionPolicy.named("fp16").flow
    assert "unscaled loss" in PrecisionPolicy.named("bf16").flow
    assert "delayed scaling" in PrecisionPolicy.named("fp8-delayed").flow
    assert "current scaling" in PrecisionPolicy.named("fp8").flow
    assert "no cast" in PrecisionPolicy.named("fp32").flow
    hybrid = PrecisionPolicy.named("fp8").flow
    assert "fp8_e4m3 x fp8_e4m3 forward, fp8_e5m2 x fp8_e4m3 backward" in hybrid


FP8 = {"compute": "bf16", "quantization": {"scaling": "current"}}
FP16 = {"compute": "fp16", "loss_scale": {"kind": "dynamic"}}
BAD = [
    # (where, the changed settings, what the message holds)
    ("compute", {"compute": "fp8_e4m3"}, "compute=fp8_e4m3 .* fp32, tf32, bf16 or fp16"),
    ("compute", {"compute": "int8"}, "compute=int8"),
    ("compute", {"compute": "bf17"}, "compute=bf17 is unknown: did you mean 'bf16'"),
    ("compute", FP8 | {"compute": "fp16"}, r"compute=fp16 .* bf16 \(or fp32\) beside quantized GEMMs"),
    ("compute", FP8 | {"compute": "tf32"}, "compute=tf32"),
    ("reduce", {"reduce": "fp8_e5m2"}, "reduce=fp8_e5m2 .* fp32 or bf16"),
    ("reduce", {"reduce": "tf32"}, "reduce=tf32"),
    ("keep", {"keep": "("}, r"keep='\(' is not a regular expression"),
    ("keep", {"keep": None}, "keep has no value"),
    ("name", {"name": None}, "name has no value"),
    ("backend", {"backend": "cuda"}, "backend=cuda is unknown: known: auto"),
    ("quantization.forward", {"forward": "bf16"}, "forward=bf16 .* fp8_e4m3 or fp8_e5m2"),
    ("quantization.forward", {"forward": "fp4_e2m1"}, "forward=fp4_e2m1"),
    ("quantization.backward", {"backward": "e8m0"}, "backward=e8m0"),
    ("quantization.scaling", {"scaling": "tensorwise"}, "scaling=tensorwise is unknown"),
    ("quantization.scaling", {"scaling": False}, "scaling=False is unknown"),
    ("quantization.history", {"history": 0}, "history=0 .* at least 1"),
    ("quantization.history", {"history": 1.5}, "history=1.5 is not a whole number"),
    ("quantization.history", {"history": "long"}, "history='long' is not a whole number"),
    ("quantization.margin", {"margin": 17}, "margin=17"),
    ("quantization.margin", {"margin": -17}, "margin=-17 .* usually 0"),
    ("quantization.margin", {"margin": 0.5}, "margin=0.5 is not a whole number"),
    ("quantization.warm_start", {"warm_start": "yes"}, "warm_start='yes' is not true or false"),
    ("quantization.marigin", {"marigin": 0}, "unknown setting .* did you mean 'margin'"),
    ("loss_scale.kind", {"kind": "dynamik"}, "kind=dynamik is unknown: did you mean 'dynamic'"),
    ("loss_scale.init", {"init": 0.0}, "init=0.0 .* above 0"),
    ("loss_scale.init", {"init": -65536.0}, "init=-65536"),
    ("loss_scale.init", {"init": math.inf}, "init=inf .* finite"),
    ("loss_scale.init", {"init": 1e39}, r"init=1e\+39 .* finite"),
    ("loss_scale.init", {"init": math.nan}, "init=nan"),
    ("loss_scale.growth", {"growth": 1.0}, "growth=1.0 .* more than 1"),
    ("loss_scale.growth", {"growth": math.inf}, "growth=inf"),
    ("loss_scale.backoff", {"backoff": 1.0}, "backoff=1.0 .* between 0 and 1"),
    ("loss_scale.backoff", {"backoff": 0.0}, "backoff=0.0"),
    ("loss_scale.interval", {"interval": 0}, "interval=0 .* at least 1"),
    ("loss_scale.hysteresis", {"hysteresis": 0}, "hysteresis=0 .* at least 1"),
    ("loss_scale.floor", {"floor": 0.0}, "floor=0.0"),
    ("loss_scale.floor", {"floor": 1e-50}, r"floor=1e-50 .* \(FP32\)"),
    ("loss_scale.floor", {"init": 2.0, "floor": 4.0}, "floor=4.0 .* init"),
    ("loss_scale", {"loss_scale": "dynamic"}, "loss_scale must be a mapping of settings, not 'dynamic'"),
    ("precission", {"precission": 1}, "unknown setting precision.precission"),
]


@pytest.mark.parametrize(("where", "changed", "message"), BAD, ids=[f"{w}-{list(c.values())[-1]}" for w, c, _ in BAD])
def test_what_cannot_work_is_named(where, changed, message):
    base = FP16 if where.startswith("loss_scale.") else FP8 if "." in where else {}
    group = where.partition(".")[0]
    values = base | ({group: base[group] | changed} if "." in where else changed)
    assert PrecisionPolicy.from_dict(base), "the settings around it are fine"
    with pytest.raises(ValueError, match=message) as raised:
        PrecisionPolicy.from_dict(values)
    assert f"precision.{where}" in str(raised.value)


def test_where_nothing_is_scaled_or_quantized_nothing_is_refused():
    """The null objects: settings that have no meaning there are not checked, whatever a recipe left in them."""
    assert not PrecisionPolicy(quantization=Quantization(history=0, margin=99)).quantized
    assert LossScale(kind=LossScaleKind.none, init=0.0).floor == 1.0


def test_the_largest_loss_scale_is_a_number_on_the_device():
    for size in (Format.fp32.value.max, Format.fp32.value.min_normal):
        made = LossScaler(LossScale(kind=LossScaleKind.dynamic, init=size, floor=2.0**-126), torch.device("cpu"))
        assert made.scale.item() == size


@pytest.mark.parametrize("text", ["name: [fp8", "a: b: c", "\t- x"])
def test_a_file_that_is_no_yaml_is_named(tmp_path, text):
    path = tmp_path / "torn.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"torn\.yaml is not YAML: .*line 1"):
        PrecisionPolicy.named(path)


@pytest.mark.parametrize("text", ["", "fp8", "- fp8"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="precision must be a mapping of settings"):
        PrecisionPolicy.named(path)


@pytest.mark.parametrize("part", ["policy", "loss_scale", "quantization"])
def test_policies_are_frozen(part):
    policy = PrecisionPolicy.named("fp8-delayed")
    value = policy if part == "policy" else getattr(policy, part)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))


def test_policies_are_values():
    made = [PrecisionPolicy.named(path) for path in RECIPES for _ in range(2)]
    assert len(set(made)) == len(RECIPES), "equal policies hash alike, different ones differ"
    for policy in made:
        again = pickle.loads(pickle.dumps(policy))
        assert again == policy
        assert hash(again) == hash(policy)
        other = dataclasses.replace(policy.quantization, history=7)
        assert dataclasses.replace(policy, quantization=other) != policy


def powers(low, high):
    return st.integers(low, high).map(lambda exponent: 2.0**exponent)


LOSS_SCALES = st.builds(
    LossScale,
    kind=st.sampled_from(LossScaleKind),
    init=powers(0, 127),
    growth=st.floats(1.125, 16.0),
    backoff=st.floats(0.0625, 0.9375),
    interval=st.integers(1, 10**6),
    hysteresis=st.integers(1, 100),
    floor=powers(-126, 0),
)
QUANTIZATIONS = st.builds(
    Quantization,
    scaling=st.sampled_from(Scaling),
    forward=st.sampled_from(FP8_FORMATS),
    backward=st.sampled_from(FP8_FORMATS),
    history=st.integers(1, 4096),
    margin=st.integers(-16, 16),
    warm_start=st.booleans(),
)


@st.composite
def policies(draw):
    quantization = draw(QUANTIZATIONS)
    free = COMPUTE_FORMATS if quantization.scaling is Scaling.none else (Format.bf16, Format.fp32)
    return PrecisionPolicy(
        name=draw(st.text(max_size=20)),
        compute=draw(st.sampled_from(free)),
        reduce=draw(st.sampled_from([Format.fp32, Format.bf16, Format.fp16])),
        loss_scale=draw(LOSS_SCALES),
        quantization=quantization,
        backend=draw(st.sampled_from(["auto", "autocast", "te", "native", "emulated"])),
        keep=draw(st.sampled_from(["", "head", r"(.*\.)?(embed|head)", r"blocks\.[0-3]\..*"])),
    )


@settings(max_examples=40, deadline=None)
@given(policies())
def test_plain_values_hold_all_of_a_policy(policy):
    """Through JSON (run folders) and YAML (recipes), every setting away from its default."""
    plain = to_plain(policy)
    assert PrecisionPolicy.from_dict(plain) == policy
    assert PrecisionPolicy.from_dict(json.loads(json.dumps(plain))) == policy
    assert PrecisionPolicy.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == policy
