"""model=hf: what transformers builds, in our hands. Oracles: transformers' own loss, its loop over experts, the bytes
that a real run measures, FLOPs that torch counts."""

import json
import re

import commands
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mptrain import cli
from mptrain.build.assemble import assemble
from mptrain.build.preflight import prepare
from mptrain.checkpoint.checkpoints import load
from mptrain.config import composed, parse_open
from mptrain.loggers import NullSink
from mptrain.memory.training import trace
from mptrain.memory.training.live import WINDOWS, by_role
from mptrain.models import _huggingface, hf
from mptrain.precision import Precision
from mptrain.precision.convert import select
from mptrain.telemetry.audit import StepAudit

VOCAB, BLOCK = 64, 16
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**LLAMA, **DEEPSEEK},
    "qwen3_moe": {**LLAMA, "num_experts": 32, "moe_intermediate_size": 16, "num_experts_per_tok": 4, "head_dim": 8},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 8},
    "gpt_neo": {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "max_position_embeddings": 64},
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def write(tmp_path):
    """Writes a family's config.json and returns its path."""

    def written(family, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": family, **FAMILIES.get(family, {}), **changes}))
        return str(path)

    return written


def batch(rows=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2, rows, BLOCK), generator=generator).unbind()


def own(path, experts="eager"):
    """The model as transformers makes it, with its own loop over experts."""
    with _huggingface.silent():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_config(config, experts_implementation=experts, dtype=torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_loss_gradients_and_parameters_are_those_of_transformers(family, write):
    path = write(family)
    ours, theirs = hf.build(hf.Config(path, block_size=BLOCK)).eval(), own(path).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    transposed = {f"{name}.weight" for name in _huggingface.conv1d_layers(theirs)}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases too
            ours.net.get_parameter(name).copy_(p.t() if name in transposed else p)
    tokens, _ = batch()
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    expected = theirs(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, p in theirs.named_parameters():
        grad = ours.net.get_parameter(name).grad
        torch.testing.assert_close(grad.t() if name in transposed else grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_is_filled_as_transformers_fills_it(family, write):
    config = hf.Config(write(family), block_size=BLOCK)
    direct = hf.build(config)
    with torch.device("meta"):
        model = hf.build(config)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)  # what is not filled shows
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        model.reset_parameters()
        drawn.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    for (name, a), b in zip(direct.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(direct.named_parameters(), model.named_parameters(), strict=True):
        assert (name, a.detach().std(correction=0) > 0) == (b[0], b[1].detach().std(correction=0) > 0)
        if a.numel() > 500:
            assert b[1].std().item() == pytest.approx(a.std().item(), rel=0.2), name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neo"])
def test_flops_are_those_that_torch_counts(family, write):
    model = hf.build(hf.Config(write(family), block_size=BLOCK))
    tokens, targets = batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets).backward()
    assert model.flops_per_token() * targets.numel() == counter.get_total_flops()


def test_fp8_finds_every_product_of_a_gpt2(write):
    model = hf.build(hf.Config(write("gpt2"), block_size=BLOCK))
    chosen, _ = select(model, r"(.*\.)?lm_head", multiple=16)
    assert len(chosen) == 2 * 4


@pytest.mark.parametrize(("precision", "experts_in"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "bf16")])
def test_experts_compute_in_the_precision(precision, experts_in, write):
    """transformers' grouped product would stay in FP32, under autocast and under emulation."""
    model = hf.build(hf.Config(write("mixtral"), block_size=BLOCK))
    prepared = Precision(precision).prepare(model)
    with StepAudit(model, prepared) as step:
        with prepared.forward():
            loss = model(*batch())
        prepared.backward(loss)
    assert step.result.problems() == []
    ran = {operand for row in step.result.rows if row.layer.endswith(".experts") for operand in row.ran}
    assert ran == {experts_in}


@pytest.mark.parametrize(
    ("family", "precision", "more"),
    [
        ("llama", "fp32", ()),
        ("llama", "fp8", ("trainer.checkpointing=true",)),
        ("gpt2", "bf16", ("optim=adamw-8bit",)),
        ("gpt2", "fp8", ()),
        ("qwen2", "bf16", ("trainer.checkpointing=true", "trainer.accumulate=2")),
        ("mixtral", "bf16", ()),
        ("deepseek_v3", "bf16", ("trainer.checkpointing=true",)),
        ("qwen3_moe", "fp32", ()),  # more experts than a plan looks at one by one
    ],
)
def test_a_plan_is_what_a_run_measures(family, precision, more, write):
    sizes = ["model.block_size=16", "trainer.batch_size=4", "telemetry.record_every=0", "device=cpu"]
    path = write(family, vocab_size=256)
    config = composed(["model=hf", f"model.config={path}", f"precision={precision}", *sizes, *more])
    module, model = parse_open("mptrain.models", "model", config.model)
    trained = config.trainer
    job = trace.Job(
        module, model, config.precision, config.optim, trained.batch_size, trained.accumulate, trained.checkpointing
    )
    planned = {window: by_role(peak) for window, peak in trace.peaks(job).items()}
    run = assemble(prepare(config), NullSink())
    run.fit(until=2)
    peak = max(planned.values(), key=lambda roles: sum(roles.values()))
    assert sum(peak.values()) / 2**30 == pytest.approx(run.memory.peak_gib, rel=5e-3)
    for role, size in peak.items():
        assert size / 2**30 == pytest.approx(run.memory.roles_gib.get(role, 0.0), rel=5e-3, abs=2e-6), role


def test_a_deep_model_is_carried_on_from_shallow_ones(write, monkeypatch):
    """DeepSeek's first layers have no experts."""
    monkeypatch.setattr(trace, "DEPTHS", (2, 4, 6))
    monkeypatch.setattr(trace, "DEEP", 7)
    few = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    path = write("deepseek_v3", num_hidden_layers=8, first_k_dense_replace=2, **few)
    config = composed(["model=hf", f"model.config={path}", "model.block_size=8", "precision=fp32"])
    module, model = parse_open("mptrain.models", "model", config.model)
    job = trace.Job(module, model, config.precision, config.optim, 2)
    assert model.n_layer == 8 > trace.DEEP
    assert module.grows_evenly(model, 2, 2)
    assert trace.peaks(job) == trace.trace(job)


def test_a_gpu_plan_casts_what_is_recomputed_as_it_was(write):
    """DeepSeek's router sums in FP32 under CUDA's autocast: other formats in backward would not be taken."""
    path = write("deepseek_v3")
    config = composed(["model=hf", f"model.config={path}", "model.block_size=8"])
    module, model = parse_open("mptrain.models", "model", config.model)
    job = trace.Job(module, model, config.precision, config.optim, 2, checkpointing=True, gpu=True)
    assert set(trace.trace(job)) == set(WINDOWS)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {}),  # every sixth layer attends to all
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 10}),
        ("qwen3_moe", {"mlp_only_layers": [11]}),
        ("deepseek_v3", {"first_k_dense_replace": 9}),
        ("gpt_neo", {"num_layers": 18, "attention_types": [[["global", "local"], 9]]}),
    ],
)
def test_layers_that_differ_late_are_all_looked_at(family, changes, write):
    deep = {} if family == "gpt_neo" else {"num_hidden_layers": 18}
    config = hf.Config(write(family, **deep, **changes), block_size=BLOCK)
    assert config.n_layer == 18
    assert not hf.grows_evenly(config, 4, 2)


def test_fewer_layers_keep_what_the_file_says_of_each(write):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    path = write("gemma3_text", num_hidden_layers=4, layer_types=kinds)
    model = hf.build(hf.Config(path, block_size=BLOCK, n_layer=3))
    assert model.net.config.layer_types == kinds[:3]
    assert len(model.blocks) == 3
    with pytest.raises(ValueError, match=r"^hf: n_layer=5: the file has layer_types for 4 layers; try model.n_layer=4"):
        hf.Config(path, block_size=BLOCK, n_layer=5)


def test_the_vocabulary_is_the_files_the_datas_or_as_set(write):
    path = write("llama", pad_token_id=60)
    assert hf.Config(path, block_size=BLOCK).vocab_size == VOCAB
    for given, made in ((-1, VOCAB), (0, 50), (40, 40)):
        settings = {"config": path, "vocab_size": given, "block_size": BLOCK}
        _, config = parse_open("mptrain.models", "model", {"kind": "hf", **settings}, vocab_size=50)
        model = hf.build(config)
        assert (config.vocab_size, model.embed.num_embeddings, len(model.head.weight)) == (made,) * 3
        assert model.embed.padding_idx == (60 if made == VOCAB else None)
        left_out = 50 if given == 0 else None
        assert hf.sizes(settings, model.state_dict()).get("vocab_size") == left_out


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        (None, {}, "no config.json can be read there (No such file"),
        ('{"model_type": "lla', {}, "is not whole JSON"),
        ("[1]", {}, "holds no mapping of settings"),
        ("{}", {}, "model_type=none is an architecture that transformers"),
        ('{"model_type": "lama"}', {}, "model_type=lama is an architecture that transformers"),
        ('{"model_type": "bert"}', {}, "a bert is not a causal language model"),
        ('{"model_type": "t5"}', {}, "a t5 is not a causal language model"),
        ('{"model_type": "gemma3"}', {}, "a gemma3 is made of several models"),
        ('{"model_type": "llama", "num_hidden_layers": -2}', {}, "num_hidden_layers=-2 must be a whole number"),
        ('{"model_type": "gpt2", "vocab_size": 0}', {}, "vocab_size=0 must be a whole number above 0"),
        ('{"model_type": "llama", "hidden_size": "wide"}', {}, "does not describe a llama: "),
        ('{"model_type": "llama", "hidden_size": -64}', {}, "no llama can be built of it: "),
        ('{"model_type": "llama", "num_attention_heads": 0}', {}, ": "),
        ('{"model_type": "gpt2"}', {"block_size": 2048}, "has 1024 positions; try model.block_size=1024"),
    ],
)
def test_what_cannot_be_built_is_one_clear_message(text, settings, says, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as raised, torch.device("meta"):
        hf.build(hf.Config(str(tmp_path), **settings))
    message = str(raised.value)
    assert "model.config=" in message or "model.block_size=" in message
    assert "\n" not in message


def test_without_transformers_the_package_to_install_is_named(write, monkeypatch):
    path = write("llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.config=.*transformers is not installed: pip install transformers"):
        hf.Config(path)


def test_it_trains_resumes_and_is_exported(write, monkeypatch, tmp_path, command_line):
    """GPT-2's transposed weights go back into Conv1D."""
    path = write("gpt2", vocab_size=256)
    at = tmp_path / "runs" / "a"
    settings = ["model=hf", f"model.config={path}", "precision=bf16", "baseline=none", f"run_dir={at}"]
    TINY = [word for word in commands.TINY if "n_head" not in word and "n_embd" not in word]
    monkeypatch.setattr(commands, "TINY", TINY)
    commands.train(monkeypatch, tmp_path, *settings)
    commands.train(monkeypatch, tmp_path, *settings, "resume=auto", "trainer.max_steps=8")
    assert commands.summary_of(at)["steps"] == 8
    assert cli.main(["export", str(at), str(tmp_path / "out")]) == 0
    with _huggingface.silent():
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    newest = max((at / "checkpoints").iterdir())
    ours = hf.build(hf.Config(path, block_size=BLOCK)).eval()
    ours.load_state_dict(load(newest, torch.device("cpu"))["model"])
    tokens, _ = batch()
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)


def test_the_config_must_be_named(monkeypatch, tmp_path, command_line):
    assert "model.config has no value: set model.config=" in commands.train(monkeypatch, tmp_path, "model=hf", code=2)


def test_another_file_at_the_same_path_is_another_model(write):
    before = hf.Config(write("llama"), block_size=BLOCK).digest
    assert hf.Config(write("llama"), block_size=BLOCK).digest == before
    assert hf.Config(write("llama", rope_theta=5.0), block_size=BLOCK).digest != before
