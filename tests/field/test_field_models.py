"""Loops that users have, in every precision: five steps, the loss falls, and what ran is what was reported."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from mptrain import Precision

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # transformers' new name for it
]

NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
SIZE = 128  # divides by every recipe's multiple
TOKENS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 64, "hidden_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": SIZE, "max_position_embeddings": 32}  # fmt: skip


def bert():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0))
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "bert.encoder.layer.0.output.dense"


def gpt2():
    settings = {"n_embd": SIZE, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32, "resid_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=1, eos_token_id=2))
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "transformer.h.0.mlp.c_fc"


def t5():
    settings = {"d_model": SIZE, "d_kv": 64, "d_ff": SIZE, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings, decoder_start_token_id=0))
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "encoder.block.0.layer.1.DenseReluDense.wi"


def vit():
    settings = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(**settings, image_size=8, patch_size=4, num_labels=4)
    model = transformers.ViTForImageClassification(config)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, lambda: model(pixel_values=images, labels=torch.arange(4)).loss, "vit"


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=SIZE, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=SIZE, decoder_ffn_dim=SIZE, num_mel_bins=8,
        max_source_positions=8, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    sound = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return model, lambda: model(input_features=sound, labels=TOKENS).loss, "model.encoder.layers.0.fc1"


def mixtral():
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.MixtralForCausalLM(config)
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "model.layers.0.self_attn.q_proj"


def llama_checkpointed():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))
    model.gradient_checkpointing_enable()
    model.train()
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "model.layers.0.mlp.up_proj"


def lora():
    """FP32 adapters on a frozen BF16 base."""
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)).bfloat16()
    settings = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings, autocast_adapter_dtype=True)
    return model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss, "layers.0.mlp.up_proj"


class Head(nn.Module):
    """Something of torch between an embedding and a head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(64, SIZE), inner, nn.Linear(SIZE, SIZE)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = self.inner(hidden, hidden) if isinstance(self.inner, nn.Transformer) else self.inner(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), tokens.flatten())


def transformer():
    model = Head(nn.Transformer(SIZE, 2, 1, 1, SIZE, dropout=0.0, batch_first=True))
    return model, lambda: model(TOKENS), "inner.encoder.layers.0.linear1"


def lstm():
    model = Head(nn.LSTM(SIZE, SIZE, batch_first=True))
    return model, lambda: model(TOKENS), "out"


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, 16),
    )  # fmt: skip
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, lambda: nn.functional.cross_entropy(model(images), torch.arange(8)), "6"


def checkpointed():
    """torch.utils.checkpoint in the user's own forward, reentrant as old code has it."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss():
        return (model[3:](checkpoint(model[:3], x, use_reentrant=True)).float() - 1).square().mean()

    return model, loss, "0"


LOOPS = (bert, gpt2, t5, vit, whisper, mixtral, llama_checkpointed, lora, transformer, lstm, convolutions, checkpointed)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_lower_the_loss_and_run_as_reported(name, loop):
    torch.manual_seed(0)
    model, loss_of, layer = loop()
    precision = Precision(name)
    if loop is lora and name in ("fp32", "tf32"):
        with pytest.raises(ValueError, match=r"is torch\.bfloat16 and frozen.*use precision=bf16"):
            precision.prepare(model)
        return
    precision.prepare(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=3e-3, fused=True)
    losses, applied = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        while applied < 5:
            precision.counters.sample(["counts"])
            with precision.forward():
                loss = loss_of()
            precision.backward(loss)
            counts = precision.counters.take()["counts"][:, 0].tolist()
            applied += precision.step(optimizer, clip=1.0).applied
            optimizer.zero_grad()
            losses.append(loss.item())
            assert len(losses) < 20, "the loss scale never fits"
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in trained)
    if not precision.policy.quantized:
        assert not precision.report.converted
        return
    assert any(layer in converted for converted in precision.report.converted), str(precision.report)
    ran = {slot[0] for slot, count in zip(precision.counters.slots, counts, strict=True) if count}
    assert ran == set(precision.report.converted)


@pytest.mark.parametrize("name", NAMES)
def test_a_gan_with_two_optimizers(name):
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(inplace=True), nn.Linear(SIZE, SIZE))
    judge = nn.Sequential(nn.Linear(SIZE, SIZE), nn.LeakyReLU(0.2, inplace=True), nn.Linear(SIZE, 1))
    both = nn.ModuleDict({"maker": maker, "judge": judge})
    precision = Precision(name).prepare(both)
    optimizers = {part: AdamW(module.parameters(), lr=1e-3) for part, module in both.items()}
    real, noise = torch.randn(16, SIZE) + 1, torch.randn(16, SIZE)
    judged = nn.functional.binary_cross_entropy_with_logits
    steps: dict[str, list[float]] = {"maker": [], "judge": []}
    for _ in range(8):
        for part in ("judge", "maker"):
            optimizers[part].zero_grad()
            with precision.forward():
                fake = maker(noise)
                if part == "judge":
                    sure = judge(real), judge(fake.detach())
                    loss = judged(sure[0], torch.ones(16, 1)) + judged(sure[1], torch.zeros(16, 1))
                else:
                    loss = judged(judge(fake), torch.ones(16, 1))
            precision.backward(loss)
            if precision.step(optimizers[part], clip=1.0).applied:
                steps[part].append(loss.item())
    assert min(len(losses) for losses in steps.values()) >= 5
    assert steps["judge"][-1] < steps["judge"][0]


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_trains(name):
    """torch.amp's recipe: the penalty is on the gradient of the input, and its own gradient reaches the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 16))
    precision = Precision(name).prepare(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    x = torch.randn(16, SIZE).requires_grad_()
    penalties: list[float] = []
    while len(penalties) < 6:
        with precision.forward():
            out = model(x).float()
            (inner,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            penalty = (inner.float().norm(dim=1) - 1).square().mean()
            loss = 0.01 * out.square().mean() + penalty
        precision.backward(loss)
        if precision.step(optimizer).applied:
            penalties.append(penalty.item())
        optimizer.zero_grad()
    assert penalties[-1] < 0.9 * penalties[0]
