"""Recurrent layers are planned with what their kernels keep, against the same step really run."""

import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mptrain import Precision, PrecisionPolicy
from mptrain.memory.training import trace
from mptrain.memory.training.live import UPDATE, resident, watched
from mptrain.models import BaseConfig
from mptrain.optim import OptimConfig, build_optimizer

BATCH = 6


@dataclass(frozen=True)
class Config(BaseConfig):
    vocab_size: int = 64
    block_size: int = 50
    kind: type[nn.RNNBase] = nn.LSTM
    layers: int = 1
    bidirectional: bool = False


class Recurrent(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, 48)
        self.layers = config.kind(48, 96, config.layers, batch_first=True, bidirectional=config.bidirectional)
        self.head = nn.Linear(96 * (1 + config.bidirectional), config.vocab_size)

    def forward(self, tokens, targets):
        out, _ = self.layers(self.embedding(tokens))
        return F.cross_entropy(self.head(out).flatten(0, 1), targets.flatten())


KIND = types.ModuleType("recurrent")
KIND.Config, KIND.build, KIND.INPUT = Config, Recurrent, "tokens"


def planned_bytes(config, policy, **job):
    peaks = trace.trace(trace.Job(KIND, config, policy, OptimConfig(), BATCH, **job))
    return max(sum(peak.values()) for peak in peaks.values())


def measured_bytes(config, policy):
    model = Recurrent(config)
    precision = Precision(policy).prepare(model)
    optimizer = build_optimizer(OptimConfig(), model)
    tokens, targets = torch.randint(config.vocab_size, (2, BATCH, config.block_size))

    def step(at_update=lambda: None):
        with precision.forward():
            loss = model(tokens, targets)
        precision.backward(loss)
        at_update()
        precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    step()
    with watched(dict(resident(model, optimizer)), model) as meter:
        step(lambda: meter.at(UPDATE))
    return max(sum(peak.values()) for peak in meter.peaks.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(layers=2, bidirectional=True),
        Config(block_size=9),
        Config(kind=nn.GRU),
        Config(kind=nn.RNN),
    ],
    ids=["LSTM", "two layers, both directions", "short", "GRU", "RNN"],
)
def test_a_recurrent_step_is_planned_to_two_percent(config, precision, one_thread):
    """oneDNN rounds its workspace to pages: 2 % of the few MiB here."""
    policy = PrecisionPolicy.named(precision)
    assert planned_bytes(config, policy) == pytest.approx(measured_bytes(config, policy), rel=0.02)


def test_a_gpu_keeps_what_only_it_can_tell():
    with pytest.raises(ValueError, match=r"layers is an nn\.GRU, for which cuDNN keeps a reserve"):
        planned_bytes(Config(kind=nn.GRU), PrecisionPolicy.named("bf16"), gpu=True)
