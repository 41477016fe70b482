"""Ranks that die, hang, start late, or are told to stop; losses that spike; storms of NaN."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from mptrain import build
from mptrain.config import composed
from mptrain.distributed import joining
from mptrain.distributed.watchdog import HUNG
from mptrain.training.resume import Diverged

SMALL = (
    "model=gpt-nano", "model.n_embd=32", "model.n_layer=1", "model.n_head=2", "model.block_size=16",
    "trainer.accumulate=2", "trainer.batch_size=2", "trainer.max_steps=12", "trainer.eval_batches=2", "baseline=none",
    "logger=jsonl", "telemetry.every=2", "telemetry.record_every=0", "checkpoint.every=3",
)  # fmt: skip


def run_of(folder, *overrides):
    return build.build(composed([*SMALL, f"run_dir={folder}", *overrides]))


def told(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def loses_rank_1(rank, folder, number):
    run = run_of(folder, "dist=ddp", "dist.timeout_s=6")
    tick = run.sinks.tick

    def at(step):
        tick(step)
        if rank == 1 and step == 4:
            time.sleep(1.2)  # a beat, so that the others know where it was
            os.kill(os.getpid(), number)

    run.sinks.tick = at
    run.train()


@pytest.mark.multi
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 1), (signal.SIGSTOP, HUNG)], ids=["dies", "hangs"])
def test_a_lost_rank_ends_the_others_and_is_named(number, status, tmp_path):
    began = time.monotonic()
    (first, words), _ = ranks.outcomes(2, loses_rank_1, str(tmp_path / "run"), number, of=[0])
    assert first == status, words
    assert "rank 1 (" in words
    assert "does not answer any more" in words
    assert "at step 4" in words
    assert time.monotonic() - began < 60
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def stops(rank, folder):
    """SIGTERM comes to rank 1 alone, in the middle of its step."""
    run = run_of(folder, "dist=ddp")
    tick = run.sinks.tick

    def at(step):
        tick(step)
        if rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run.sinks.tick = at
    run.train()
    return run.trainer.step_number, run.trainer.stopped_early


@pytest.mark.multi
def test_a_signal_to_one_rank_stops_all_at_one_step_and_saves(tmp_path):
    (step, stopped), other = ranks.run(2, stops, str(tmp_path / "run"))
    assert (step, stopped) == other
    assert stopped
    assert 5 < step < 9
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert ranks.run(2, goes_on, str(tmp_path / "run")) == [12, 12]
    steps = [row["step"] for row in told(tmp_path / "run") if "train/loss_step" in row]
    assert steps == list(range(1, 13))


def goes_on(rank, folder):
    run = run_of(folder, "dist=ddp", "resume=auto")
    run.train()
    return run.trainer.step_number


def meets(rank, folder):
    """The second attempt, with what the first one left in the store."""
    store = dist.FileStore(str(Path(folder) / "shared"), -1)
    if rank == 1:
        time.sleep(0.3)  # rank 0 finds its predecessor's name first
    room = joining.meet(store, rank, 2, 20.0)
    room.set(f"mark{rank}", str(rank))
    room.wait([f"mark{1 - rank}"])
    return room.get(f"mark{1 - rank}").decode()


@pytest.mark.multi
def test_ranks_of_one_attempt_do_not_meet_the_dead(tmp_path):
    stale = dist.distributed_c10d.PrefixStore("mptrain", dist.FileStore(str(tmp_path / "shared"), -1))
    stale.set("hello/1", "a name of a process that died")
    stale.set("mark1", "stale")
    assert ranks.run(2, meets, str(tmp_path)) == ["1", "0"]


def test_ranks_that_never_come_are_waited_for_no_longer_than_set():
    with pytest.raises(ValueError, match=r"waited 0 s \(dist.timeout_s\) for the other ranks"):
        joining.meet(dist.HashStore(), 0, 2, 0.1)


class Spiky:
    """Data whose steps in ``at`` have targets drawn at random; the steps that were asked for are kept."""

    def __init__(self, data, at):
        self.data, self.at, self.asked = data, at, []

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, step, **how):
        self.asked.append(step)
        found = self.data.batch(step, **how)
        if step in self.at:
            found["targets"] = torch.randint(found["targets"].max() + 1, found["targets"].shape)
        return found


SPIKES = (
    "trainer.max_steps=60", "trainer.accumulate=1", "trainer.batch_size=16", "checkpoint.every=10",
    "trainer.on_spike=rollback",
    "telemetry.every=1", "trainer.eval_every=0", "optim.lr=0.003", "checkpoint.keep=9",
)  # fmt: skip


def test_a_spike_rolls_back_and_skips_its_batches(tmp_path):
    run = run_of(tmp_path / "run", *SPIKES)
    run.trainer.data = Spiky(run.trainer.data, at={43})
    run.train()
    (event,) = [event for event in told(tmp_path / "run", "events.jsonl") if event["event"] == "rollback"]
    assert (event["step"], event["to"], event["skipped_batches"]) == (44, 40, 4)
    assert run.trainer.ledger.rollbacks == 1
    assert run.trainer.step_number == 60
    after = run.trainer.data.asked
    assert after[after.index(43) + 1] == 44, "step 41 again, with the batch behind the spike's"
    assert after[-1] == 59 + 4
    losses = run.trainer.losses
    assert max(losses[step] for step in range(47, 61)) < losses[40] + 0.5


def test_spikes_that_do_not_end_stop_the_run(tmp_path):
    run = run_of(tmp_path / "run", *SPIKES)
    run.trainer.data = Spiky(run.trainer.data, at=set(range(43, 999)))
    with pytest.raises(Diverged, match=r"spiked again after 3 rollbacks to step 40: lower optim\.lr"):
        run.train()
    assert (tmp_path / "run" / "checkpoints" / "step-00000040").is_dir()


def test_a_storm_of_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = run_of(tmp_path / "run", "trainer.max_skips_in_a_row=5", "trainer.max_steps=30")
    model, calls = run.trainer.model, []

    def poison(module, args, out):
        calls.append(1)
        return out * math.nan if len(calls) > 2 * 6 else out

    model.blocks[0].register_forward_hook(poison)
    with pytest.raises(Diverged, match=r"5 steps skipped in a row \(NaN loss .*trainer.max_skips_in_a_row"):
        run.train()
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()
    fresh = run_of(tmp_path / "run", "resume=auto", "trainer.max_steps=30")
    assert fresh.trainer.step_number in (6, 9)
    assert fresh.trainer.ledger.applied == 6
    fresh.sinks.close()
    fresh.held[0].close()


def test_rollback_needs_checkpoints():
    with pytest.raises(ValueError, match=r"trainer\.on_spike=rollback needs checkpoints .* checkpoint\.every=50"):
        composed(["trainer.on_spike=rollback"])
