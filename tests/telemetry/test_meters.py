"""Memory by role, on a model whose bytes can be counted by hand."""

import pytest
import torch

from mptrain import Precision
from mptrain.telemetry.meters import GIB, PeakMemory

WIDTH, ROWS = 256, 4096


def measured(precision, rounds=2):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 16))
    bound = Precision(precision).prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    memory = PeakMemory(torch.device("cpu"))
    x = torch.randn(ROWS, WIDTH)
    grads = []
    for _ in range(rounds):
        with memory.measured(model, optimizer):
            with bound.forward():
                loss = model(x).square().mean()
            bound.backward(loss)
        grads.append([p.grad.clone() for p in model.parameters()])
        bound.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    return memory, model, grads


def test_the_bytes_of_every_role_are_those_of_the_model(one_thread):
    memory, model, _ = measured("fp32")
    roles = {role: gib * GIB for role, gib in memory.roles_gib.items()}
    weights = sum(p.nbytes for p in model.parameters())
    steps = 4 * len(list(model.parameters()))  # AdamW's counts of steps
    assert {*roles} == {"weights", "gradients", "moments", "activations", "workspace"}
    assert roles["weights"] == weights
    assert roles["moments"] == 2 * weights + steps
    # The peak is in the ReLU's backward: its saved output, its two gradients, and what the last layer has left.
    hidden = ROWS * WIDTH * 4
    assert roles["activations"] == hidden
    assert roles["gradients"] == (WIDTH * 16 + 16) * 4
    assert 2 * hidden <= roles["workspace"] <= 2.2 * hidden
    assert sum(roles.values()) == pytest.approx(memory.peak_gib * GIB)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_measuring_changes_no_bit(precision, one_thread):
    _, _, grads = measured(precision, rounds=1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 16))
    bound = Precision(precision).prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(ROWS, WIDTH)
    assert len(list(optimizer.param_groups)) == 1
    with bound.forward():
        loss = model(x).square().mean()
    bound.backward(loss)
    for before, p in zip(grads[0], model.parameters(), strict=True):
        assert torch.equal(before, p.grad)
