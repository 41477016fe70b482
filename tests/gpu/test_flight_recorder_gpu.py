"""On a GPU: what is seen is what a CPU sees, and a step that nobody samples reads nothing back."""

import pytest
import torch

from mptrain import Precision
from mptrain.models import gpt
from mptrain.telemetry.monitor import Monitor, TelemetryConfig

NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU here"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")]
SIZES = gpt.Config(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=64)


class Loop:
    def __init__(self, name, device, every):
        torch.manual_seed(0)
        self.model = gpt.build(SIZES).to(device)
        self.precision = Precision(name).prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.monitor = Monitor(self.model, self.precision, TelemetryConfig(record_every=every), 10**9)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 64, (4, 33), generator=generator).to(device)

    def step(self, number):
        watched = self.monitor.due(number)
        if watched:
            self.monitor.begin_step(number)
        with self.precision.forward():
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        self.precision.backward(loss)
        if watched:
            self.monitor.see_gradients()
        outcome = self.precision.step(self.optimizer, clip=1.0)
        sample = self.monitor.end_step(number, self.optimizer, outcome) if watched else None
        self.optimizer.zero_grad()
        return sample


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8"])
def test_an_unsampled_step_reads_nothing_back(name):
    loop = Loop(name, "cuda", 10**9)
    for number in (1, 2, 3):
        loop.step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert loop.step(4) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_sees_what_a_cpu_sees():
    """FP32 weights before any step, and every row counted; the first gradients to the order of their sums."""
    records = [Loop("bf16", device, 1).step(1).record for device in ("cpu", "cuda")]
    assert records[0].rows == records[1].rows
    for index, (layer, role, _) in enumerate(records[0].rows):
        ours, theirs = (record.tables["histogram"][index] for record in records)
        assert ours.sum() == theirs.sum(), (layer, role)
        if role == "weight":
            assert torch.equal(ours, theirs), layer
