"""Every file of mptrain/optim that builds an optimizer keeps the same promises. Adding a file tests it."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

from mptrain import Precision, PrecisionPolicy, models, optim
from mptrain.memory.training.plan import plan
from mptrain.memory.training.trace import Job
from mptrain.optim import OptimConfig, build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
STATE_STEPS = 3


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 64))


def prepared(seed=0):
    net = model(seed)
    return net, Precision("bf16").prepare(net)


def train(net, optimizer, precision, steps, *, seed=1, spoiled=()):
    """Step through ``precision``; the input of the steps in ``spoiled`` holds an Inf. Tells which were skipped."""
    generator = torch.Generator().manual_seed(seed)
    skipped = []
    for step in range(steps):
        x = torch.randn(16, 64, generator=generator)
        if step in spoiled:
            x[0, 0] = math.inf
        with precision.forward():
            loss = net(x).float().square().mean()
        precision.backward(loss)
        skipped.append(not precision.step(optimizer, clip=1.0).applied)
        optimizer.zero_grad()
    return skipped


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("kind", optim.kinds())
class TestEveryOptimizer:
    def test_it_learns(self, kind):
        net = model()
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
        optimizer = build_optimizer(OptimConfig(kind=kind, lr=0.01), net)
        losses = []
        for _ in range(50):
            loss = (net(x) - x).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.8 * losses[0]

    def test_a_bad_step_leaves_weights_and_state_as_they_are(self, kind):
        """The first step of all and a later one: what both leave is what a run without them has."""
        spoiled, plain = prepared(), prepared()
        config = OptimConfig(kind=kind, lr=0.01)
        bad, good = (build_optimizer(config, net) for net, _ in (spoiled, plain))
        assert train(spoiled[0], bad, spoiled[1], 1, spoiled=(0,)) == [True]
        assert all(torch.equal(a, b) for a, b in zip(weights(spoiled[0]), weights(plain[0]), strict=True))
        for (net, precision), optimizer in ((spoiled, bad), (plain, good)):
            assert train(net, optimizer, precision, STATE_STEPS) == [False] * STATE_STEPS
        assert train(spoiled[0], bad, spoiled[1], 1, spoiled=(0,)) == [True]
        for (net, precision), optimizer in ((spoiled, bad), (plain, good)):
            train(net, optimizer, precision, STATE_STEPS, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(weights(spoiled[0]), weights(plain[0]), strict=True))

    def test_saved_and_loaded_it_continues_bit_for_bit(self, kind):
        config = OptimConfig(kind=kind, lr=0.01)
        net, precision = prepared()
        optimizer = build_optimizer(config, net)
        train(net, optimizer, precision, STATE_STEPS)
        other, again = prepared(seed=5)
        loaded = build_optimizer(config, other)
        other.load_state_dict(copy.deepcopy(net.state_dict()))
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(net, optimizer, precision, STATE_STEPS, seed=2)
        train(other, loaded, again, STATE_STEPS, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(other), strict=True))

    def test_matrices_decay_and_vectors_do_not(self, kind):
        """With gradients of zero, decay alone moves a weight: in the first step by the share lr * weight_decay."""
        net = model()
        before = weights(net)
        optimizer = build_optimizer(OptimConfig(kind=kind, lr=0.1, weight_decay=0.5), net)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for old, new in zip(before, net.parameters(), strict=True):
            torch.testing.assert_close(new.detach(), old * 0.95 if old.ndim == 2 else old, rtol=1e-6, atol=0.0)

    def test_its_memory_is_planned_to_the_byte(self, kind):
        """The plan's moments are the bytes of a real optimizer's state."""
        gpt, config = models.load("gpt"), OptimConfig(kind=kind)
        sizes = gpt.Config(vocab_size=256, block_size=16, n_layer=2, n_embd=64)
        planned = plan(Job(gpt, sizes, PrecisionPolicy.named("bf16"), config, batch_size=2))
        net = gpt.build(sizes)
        optimizer = build_optimizer(config, net)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
        assert planned.roles["moments"] == sum(value.nbytes for value in state)

    def test_it_takes_the_contracts_arguments(self, kind):
        build = optim.registry.load("mptrain.optim", kind).build
        assert list(inspect.signature(build).parameters) == ["groups", "config"]


def test_a_new_file_is_a_new_kind(tmp_path, monkeypatch):
    """One file, nothing else: it is listed, chosen by ``optim.kind`` and offered to who mistypes it."""
    (tmp_path / "signed.py").write_text(
        "import torch\n\ndef build(groups, config):\n    return torch.optim.Rprop(groups, lr=config.lr)\n"
    )
    monkeypatch.setattr(optim, "__path__", [*optim.__path__, str(tmp_path)])
    assert optim.kinds() == ["adamw", "sgd", "signed"]
    assert isinstance(build_optimizer(OptimConfig(kind="signed"), model()), torch.optim.Rprop)
    with pytest.raises(ValueError, match=r"optim\.kind=singed is unknown: did you mean 'signed'"):
        OptimConfig(kind="singed")


def test_fewer_bits_are_adamws():
    for setting in ({"weights": "bf16"}, {"moments": "int8"}):
        with pytest.raises(ValueError, match=r"sgd keeps both in FP32, use optim\.kind=adamw"):
            OptimConfig(kind="sgd", **setting)
