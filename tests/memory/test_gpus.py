"""Facts of GPUs: a YAML each, read in one place."""

import re

import pytest
import yaml

from mptrain.memory import gpus

SXM = {"fp8": 1979, "bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}
AMPERE = {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", SXM),
        ("NVIDIA H200", SXM),
        ("NVIDIA GH200 480GB", SXM),
        ("NVIDIA A100-SXM4-40GB", AMPERE),
        ("NVIDIA A100-SXM4-80GB", AMPERE),
        ("NVIDIA A100 80GB PCIe", AMPERE),
        ("NVIDIA H100 PCIe", {}),  # 756 TFLOP/s in BF16: the SXM card's peak would halve its MFU
        ("NVIDIA H100 NVL", {}),
        ("NVIDIA H200 NVL", {}),
        ("NVIDIA L40S", {}),
        ("Tesla T4", {}),
    ],
)
def test_a_card_has_the_peaks_of_its_own_kind_or_none(device, expected):
    assert gpus.dense_tflops(device) == expected


@pytest.mark.parametrize("path", sorted(gpus.HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_read_and_has_its_source(path):
    gpu = gpus.named(path.stem.lower())
    assert gpu.name == path.stem
    assert gpu.source.startswith("https://")
    assert bool(gpu.device) == bool(gpu.dense_tflops), "peaks are of devices, which have names"
    re.compile(gpu.device)
    assert set(gpu.dense_tflops) <= {"fp8", "bf16", "fp16", "tf32", "fp32"}
    assert gpu.stated == yaml.safe_load(path.read_text())["memory"]


def test_a_new_file_is_a_new_gpu(tmp_path, monkeypatch):
    (tmp_path / "X1.yaml").write_text(
        "memory: 10GB\ndevice: X1\ndense_tflops: {bf16: 5}\nsource: https://example.com\n"
    )
    monkeypatch.setattr(gpus, "HERE", tmp_path)
    assert gpus.named("x1").memory == 10**10
    assert gpus.dense_tflops("ACME X1 Turbo") == {"bf16": 5}
