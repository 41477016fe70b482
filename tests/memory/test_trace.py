"""The plan of a training step, against the same step really run: by our trainer, on one process and on several."""

from dataclasses import replace

import pytest
import ranks
import torch

from mptrain.build.assemble import assemble
from mptrain.build.preflight import prepare
from mptrain.config import composed
from mptrain.distributed import World
from mptrain.distributed.layout import Layout
from mptrain.formats import Format
from mptrain.loggers import NullSink
from mptrain.memory.training import cuda, trace
from mptrain.memory.training.grading import graded
from mptrain.memory.training.live import LATE, by_role
from mptrain.memory.training.plan import plan, rank_job
from mptrain.models import gpt
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy
from mptrain.training.config import TrainerConfig

GPT = ["model=gpt-nano", "model.n_layer=2", "model.n_embd=64", "model.block_size=64"]
LLAMA = ["model=llama-nano", "model.n_layer=2", "model.n_embd=64", "model.n_ffn=128", "model.block_size=64"]
VIT = ["model=vit-nano", "model.n_layer=2", "data=digits", "trainer.batch_size=32"]
QUIET = ["telemetry.record_every=0", "trainer.eval_every=0"]


def grade(overrides: list[str]):
    """Plan, then two steps (three of DDP)."""
    config = composed([*overrides, *QUIET])
    prepared = prepare(config)
    planned = plan(rank_job(prepared.model_module, prepared.model_config, config, prepared.layout, gpu=False))
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=3)
    return graded(planned, trainer.memory.roles_gib)


def worst(found) -> float:
    return max(abs(share) for share in [found.off_frac, *found.by_role().values()])


@pytest.mark.parametrize(
    ("model", "precision", "checkpointing"),
    [
        *((GPT, precision, False) for precision in ("fp32", "tf32", "fp16", "fp8", "fp8-delayed", "fp8-rowwise")),
        *((GPT, precision, True) for precision in ("bf16", "fp8")),
        *((LLAMA, precision, False) for precision in ("bf16", "fp8")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_the_plan_is_what_is_measured(model, precision, checkpointing, one_thread):
    """Every role to 1e-4 of the peak; the FP8 layers' books of a few hundred bytes are what is left."""
    settings = [*model, f"precision={precision}", f"trainer.checkpointing={str(checkpointing).lower()}"]
    assert worst(grade(settings)) < 1e-4


@pytest.mark.parametrize(
    "more",
    [
        ["trainer.accumulate=3"],
        ["optim=adamw-8bit", "model.n_embd=128"],
        ["optim=adamw-remainder"],
        ["optim.ema_decay=0.99"],
        ["precision=fp8-delayed", "trainer.accumulate=2"],
        ["precision=fp8", "precision.backend=native"],
        ["model.tied=false", "model.dropout=0.1"],
    ],
    ids=lambda more: more[0],
)
def test_other_settings_are_planned_as_well(more, one_thread):
    assert worst(grade([*GPT, "precision=bf16", *more])) < 1e-3


def test_images_are_planned_as_well(one_thread):
    assert worst(grade([*VIT, "precision=bf16"])) < 1e-3


def _on_a_rank(rank, overrides):
    """Inside the run, where the process group is real, and outside, where it is made up."""
    for _ in range(3):  # on a loaded machine a collective may hold its buffer a moment longer, which only adds
        found = grade(overrides)
        apart = float(World().max(torch.tensor(worst(found))))  # alike on all ranks, so that they repeat together
        if apart < 1e-3:
            break
    return apart, found.planned_gib


@pytest.mark.multi
@pytest.mark.parametrize(
    ("precision", "layout", "size"),
    [
        ("fp8", ["dist=ddp", "trainer.accumulate=4"], 2),
        ("bf16", ["dist=fsdp"], 2),
        ("bf16", ["dist.tp=2"], 2),
    ],
    ids=str,
)
def test_the_plan_of_a_rank_is_what_the_rank_measures(precision, layout, size):
    overrides = [*GPT, f"precision={precision}", "trainer.batch_size=8", *layout]
    found = ranks.run(size, _on_a_rank, overrides)
    assert max(apart for apart, _ in found) < 1e-3
    config = composed([*overrides, *QUIET])
    job = rank_job(gpt, gpt.Config(256, 64, 2, 4, 64), config, Layout.of(config.dist, size), gpu=False)
    made_up = {role: bytes_ / 2**30 for role, bytes_ in plan(job).roles.items()}
    assert made_up == found[0][1], "planned alone, without the other ranks"


def job(n_layer: int, precision: str = "bf16", **more: object) -> trace.Job:
    policy = PrecisionPolicy.named(precision)
    return trace.Job(gpt, gpt.Config(256, 64, n_layer, 2, 32), policy, OptimConfig(), 2, **more)


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("fp8", True)])
def test_a_deep_model_is_carried_on_to_the_byte(precision, checkpointing, one_thread):
    deep = job(10, precision, checkpointing=checkpointing)
    assert trace.peaks(deep) == trace.trace(deep)


def test_a_model_whose_depth_is_not_even_is_traced_whole(monkeypatch, one_thread):
    """Every block but the last of those beyond four is twice as wide: no line through two depths holds."""
    traced = []
    real = trace.trace
    monkeypatch.setattr(trace, "trace", lambda job: traced.append(job.config.n_layer) or real(job))

    class Uneven:
        grows_evenly = staticmethod(gpt.grows_evenly)
        INPUT = "tokens"

        @staticmethod
        def build(config):
            model = gpt.build(config)
            for block in model.blocks[4:]:
                block.mlp = torch.nn.Sequential(torch.nn.Linear(32, 512), torch.nn.Linear(512, 32))
            return model

    found = trace.peaks(replace(job(10), model=Uneven))
    assert traced == [2, 4, 6, 10]
    assert found == real(replace(job(10), model=Uneven))


def test_a_trace_leaves_nothing_behind(one_thread):
    """No fake tensor in what later steps use, no random number drawn, no storage method changed."""
    before = torch.UntypedStorage.resize_, torch.distributed.device_mesh.DeviceMesh.__init__
    torch.manual_seed(3)
    plan(replace(job(2, "fp8"), optim=OptimConfig(moments="int8")))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    assert (torch.UntypedStorage.resize_, torch.distributed.device_mesh.DeviceMesh.__init__) == before
    assert worst(grade([*GPT, "model.n_embd=128", "precision=fp8", "optim=adamw-8bit"])) < 1e-3


def test_what_is_absurd_or_cannot_be_traced_is_said():
    with pytest.raises(ValueError, match=r"trainer\.batch_size=.* at most 2\^36 tokens"):
        plan(replace(job(1), batch_size=1 << 40))
    huge = gpt.Config(256, 8, 1, 1, 1 << 40)
    with pytest.raises(ValueError, match="beyond"):
        plan(replace(job(1), config=huge, batch_size=1))

    class Counting:
        grows_evenly = staticmethod(gpt.grows_evenly)
        INPUT = "tokens"

        @staticmethod
        def build(config):
            model = gpt.build(config)
            model.blocks[0].mlp.register_forward_hook(lambda *_: torch.nonzero(_[2]))
            return model

    with pytest.raises(ValueError, match=r"depends on values, in aten\.nonzero"):
        plan(replace(job(1), model=Counting))


def test_a_gpu_is_planned_with_its_own_casts(one_thread):
    """CUDA's autocast runs norms in FP32 where the CPU's leaves them in BF16; FP32 and TF32 are alike."""
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, [4]).dtype == torch.bfloat16
        with cuda.CudaCasts():
            assert torch.nn.functional.layer_norm(x, [4]).dtype == torch.float32
            assert (x @ x.t()).dtype == torch.bfloat16
    here, there = plan(job(2)), plan(job(2, gpu=True))
    assert there.assumed["CUDA context"] == cuda.CONTEXT_BYTES
    assert there.total > there.live
    assert here.total == here.live
    fp32, tf32 = plan(job(2, "fp32", gpu=True)), plan(job(2, "tf32", gpu=True))
    assert fp32.roles == tf32.roles
    assert (fp32.backend, plan(job(2, "fp8", gpu=True)).backend) == ("autocast", "te")


def test_transformer_engine_holds_each_fp8_weight_twice(one_thread):
    wide = replace(job(2, "fp8"), config=gpt.Config(256, 64, 2, 2, 64))
    ours, te = trace.trace(wide), trace.trace(replace(wide, gpu=True))
    linear = 2 * 12 * 64 * 64
    copies = [sum(size for (role, by), size in peaks["forward"].items() if role == "weight copies" and "8 bits" in by)
              for peaks in (ours, te)]  # fmt: skip
    assert copies == [linear, 2 * linear]


def test_the_batch_of_a_step_is_accumulated_in_at_most_two_traces(one_thread):
    """More micro-batches than two find nothing that the second did not: the gradients of those before."""
    one, two, many = (by_role(trace.trace(job(2, accumulate=n))[LATE]) for n in (1, 2, 9))
    assert two == many
    assert two["gradients"] > one["gradients"]


def test_fp16_keeps_its_policy_but_for_the_loss_scale():
    stand_in = cuda.stand_in(PrecisionPolicy.named("fp16"))
    assert stand_in.compute is Format.fp16
    assert TrainerConfig().accumulate == 1
