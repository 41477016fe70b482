"""The same run on any number of ranks, in any layout: losses, scales, skips and records against one process."""

from __future__ import annotations

import pytest
import ranks
import torch
from torch.distributed.tensor import distribute_tensor

from mptrain.build.assemble import assemble
from mptrain.build.preflight import prepare
from mptrain.config import composed
from mptrain.loggers import NullSink

SMALL = (
    "model=gpt-nano", "model.n_embd=32", "model.n_layer=2", "model.n_head=2", "model.block_size=16",
    "trainer.accumulate=4", "trainer.batch_size=2", "trainer.max_steps=100", "baseline=none",
    "telemetry.every=1", "telemetry.record_every=0",
)  # fmt: skip
LAYOUTS = {
    "ddp on 2": (2, ["dist=ddp"]),
    "ddp on 4": (4, ["dist=ddp"]),
    "fsdp on 2": (2, ["dist=fsdp"]),
    "hsdp on 4": (4, ["dist=hsdp", "dist.replicas=2"]),
    "tp 2": (2, ["dist.tp=2"]),
    "fsdp x tp 2 on 4": (4, ["dist=fsdp", "dist.tp=2"]),
}


class Kept(NullSink):
    def __init__(self):
        self.scales, self.norms, self.events, self.records = [], [], [], []
        self.after_step = lambda step: None

    def tick(self, step):
        self.after_step(step)

    def metrics(self, step, values):
        if "scale/value" in values:
            self.scales.append((step, values["scale/value"]))
        if "train/grad_norm" in values:
            self.norms.append(values["train/grad_norm"])

    def event(self, event):
        self.events.append(event)

    def record(self, record):
        self.records.append(record)


def assembled(*overrides):
    sink = Kept()
    return assemble(prepare(composed([*SMALL, *overrides])), sink), sink


def whole(model):
    """All weights, [elements], on every rank."""
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([weight.detach().flatten() for weight in weights])


@torch.no_grad()
def set_weights(model, weights):
    """Give the model ``weights`` [elements], laid out as it is."""
    parts = weights.split([p.numel() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        part = part.view(parameter.shape)
        if hasattr(parameter, "placements"):
            part = distribute_tensor(part, parameter.device_mesh, parameter.placements)
        parameter.copy_(part)


def trained(rank, steps, *overrides, start=None):
    """What a rank sees of a run: losses, gradient norms, scales, events, the loss after it, weights after each step.

    ``start``: weights [steps, elements] that the steps after the first begin with, instead of their own.
    """
    run, sink = assembled(*overrides)
    weights = [whole(run.model)]

    def after_step(step):
        weights.append(whole(run.model))
        if start is not None:
            set_weights(run.model, start[step])

    sink.after_step = after_step
    run.fit(until=steps)
    after = run.evaluate()["val/loss"]
    return {
        "losses": torch.tensor([run.losses[step] for step in range(1, steps + 1)], dtype=torch.float64),
        "norms": torch.tensor(sink.norms, dtype=torch.float64),
        "scales": sink.scales,
        "events": sink.events,
        "after": after,
        "weights": torch.stack(weights),
        "records": sink.records,
    }


def step_by_step(rank, steps, start, *overrides):
    return trained(rank, steps, *overrides, start=start)


@pytest.mark.multi
@pytest.mark.parametrize(("precision", "steps"), [("fp32", 10), ("bf16", 10), ("fp16", 10), ("fp8", 10)])
def test_a_step_is_that_of_one_process(precision, steps):
    """Every step from the weights of the one process: there each micro-batch is the same on any number of ranks to the
    last bit, in any format, and only sums over them are taken in another order. (Left to itself a run turns a last bit
    into another code of its format sooner or later, and in FP8 one code is 1e-4 nats.)

    A last bit of a loss between 4 and 8 is 4.8e-7, and four are added up.
    """
    asked = f"precision={precision}"
    (alone,) = ranks.run(1, trained, steps, asked)
    moves = alone["weights"].diff(dim=0).norm(dim=1)
    names = LAYOUTS if precision == "fp32" else ("ddp on 2", "fsdp on 2")
    for name in names:
        size, overrides = LAYOUTS[name]
        run = steps if name in ("ddp on 2", "fsdp on 2") else 6  # on two cores
        gather = ["dist.gather=fp32"] if precision == "fp8" and "fsdp" in name else []
        found = ranks.run(size, step_by_step, run, alone["weights"], asked, *overrides, *gather)
        for one in found:
            assert torch.equal(one["weights"], found[0]["weights"]), name
            assert one["scales"] == found[0]["scales"] == alone["scales"][: len(one["scales"])], name
            events = [event for event in alone["events"] if event["step"] <= run]
            assert [event["event"] for event in one["events"]] == [event["event"] for event in events], name
            assert one["after"] == found[0]["after"], name
        one = found[0]
        off = (one["losses"] - alone["losses"][:run]).abs().max()
        assert off < 2e-6, (name, off)
        torch.testing.assert_close(one["norms"], alone["norms"][:run], rtol=1e-5, atol=0.0)
        off = ((one["weights"] - alone["weights"][: run + 1]).norm(dim=1)[1:] / moves[:run]).max()
        assert off < 1e-4, (name, off)  # of the step: Adam turns last bits of small sums into a little more


@pytest.mark.multi
@pytest.mark.parametrize("layout", ["ddp on 2", "fsdp on 2"])
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_bad_rank_is_skipped_by_all_and_named(precision, layout):
    """A fire drill on rank 1 alone, in a tensor that only its samples go through."""
    size, overrides = LAYOUTS[layout]
    drill = "debug.inject=3:blocks.1.mlp.up:grad_output:inf:1"
    found = ranks.run(size, trained, 6, f"precision={precision}", *overrides, drill)
    for one in found:
        skips = [event for event in one["events"] if event["event"] == "skipped"]
        assert [(skip["step"], skip["rank"]) for skip in skips] == [(3, 1)]
        assert torch.equal(one["weights"], found[0]["weights"])
        assert one["scales"] == found[0]["scales"]
    layer = skips[0]["layer"]
    assert layer.startswith("blocks.1"), layer


@pytest.mark.multi
@pytest.mark.parametrize("layout", ["ddp on 2", "fsdp on 2", "tp 2"])
def test_records_of_all_ranks_are_that_of_one_process(layout):
    """In FP32 nothing is cast: the histograms of all elements, of every role, merge to the same ones."""
    record = ("precision=fp32", "telemetry.record_every=2")
    (alone,) = ranks.run(1, trained, 2, *record)
    size, overrides = LAYOUTS[layout]
    found = ranks.run(size, trained, 2, *record, *overrides)[0]
    first, merged = alone["records"][0], found["records"][0]
    assert sorted(merged.rows) == sorted(first.rows)
    place = {row: index for index, row in enumerate(merged.rows)}
    order = torch.tensor([place[row] for row in first.rows])
    ours, theirs = merged.tables["histogram"][order], first.tables["histogram"]
    assert torch.equal(ours.sum(-1), theirs.sum(-1)), "every element counts once"
    moved = (ours - theirs).abs().sum() / 2  # a last bit can move an element to the bin beside
    assert moved <= 1e-3 * theirs.sum()
    torch.testing.assert_close(merged.tables["amax"][order], first.tables["amax"], rtol=1e-4, atol=0.0)
    assert torch.equal(merged.tables["lost"][order][:, 0], first.tables["lost"][:, 0])


def shares(rank, overrides):
    run, _ = assembled(*overrides)
    share = run.share
    batches = [
        run.data.batch(
            0, micro=micro, microbatches=share.accumulate, batch_size=share.batch_size, seed=0, rank=share.rank,
            world_size=share.size,
        )["tokens"]
        for micro in range(share.accumulate)
    ]  # fmt: skip
    return (share.batch_size, share.accumulate), torch.cat(batches)


@pytest.mark.multi
@pytest.mark.parametrize(
    ("sizes", "each"), [((4, 4), (4, 2)), ((4, 1), (2, 1)), ((3, 6), (3, 3)), ((6, 3), (3, 3)), ((2, 2), (2, 1))]
)
def test_the_samples_of_a_step_are_those_of_one_process(sizes, each):
    batch_size, accumulate = sizes
    asked = [f"trainer.batch_size={batch_size}", f"trainer.accumulate={accumulate}"]
    ((_, every),) = ranks.run(1, shares, asked)
    found = ranks.run(2, shares, [*asked, "dist=ddp"])
    assert {share for share, _ in found} == {each}
    joined = torch.cat([tokens for _, tokens in found])
    assert sorted(joined.tolist()) == sorted(every.tolist())


def test_a_batch_that_does_not_go_round_is_refused():
    from mptrain.distributed.layout import DistConfig, Layout

    layout = Layout.of(DistConfig(kind="ddp"), 4)
    with pytest.raises(ValueError, match=r"3 x 1 samples cannot be shared out among 4 ranks: .*trainer.accumulate=4"):
        layout.share(3, 1, 0)
    with pytest.raises(ValueError, match=r"2 processes, and dist=single .* add dist=ddp"):
        Layout.of(DistConfig(), 2)
    with pytest.raises(ValueError, match=r"dist.tp=2 does not divide the 3 processes"):
        Layout.of(DistConfig(kind="fsdp", tp=2), 3)
    with pytest.raises(ValueError, match=r"dist.replicas=3 does not divide 4 ranks"):
        Layout.of(DistConfig(kind="hsdp", replicas=3), 4)
