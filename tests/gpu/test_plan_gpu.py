"""The plan of a training step on a GPU, against the allocator's peak."""

import pytest
import torch

from mptrain.bench import plan as bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_plan_is_within_five_percent(precision, checkpointing):
    settings = [f"precision={precision}", "model=gpt-nano", f"trainer.checkpointing={checkpointing}"]
    row = bench.row_of("gpt", settings)
    assert row.measured <= bench.BOUND_GPU, f"planned {row.planned_mib} MiB, measured {row.peak_mib}"
