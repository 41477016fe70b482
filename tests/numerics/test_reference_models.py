"""With the same weights, the models here give the logits of Hugging Face's: an independent oracle."""

import re
import warnings

import pytest
import torch

from mptrain import models

with warnings.catch_warnings():
    # transformers and what it imports use interfaces that newer Pythons deprecate: theirs to mend, not under test here.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, BLOCK = 97, 32
GPT_NAMES = (
    (r"transformer\.wte\.", "embed."),
    (r"transformer\.wpe\.", "position."),
    (r"transformer\.h\.(\d+)\.ln_([12])", r"blocks.\1.norm\2"),
    (r"transformer\.h\.(\d+)\.attn\.c_attn", r"blocks.\1.attention.qkv"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj", r"blocks.\1.attention.out"),
    (r"transformer\.h\.(\d+)\.mlp\.c_fc", r"blocks.\1.mlp.up"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj", r"blocks.\1.mlp.down"),
    (r"transformer\.ln_f", "norm"),
    (r"lm_head", "head"),
)
LLAMA_NAMES = (
    (r"model\.embed_tokens", "embed"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"blocks.\1.attention.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"blocks.\1.attention.out"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj", r"blocks.\1.mlp.\2"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"blocks.\1.norm1"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blocks.\1.norm2"),
    (r"model\.norm", "norm"),
    (r"lm_head", "head"),
)


def renamed(name, names):
    for pattern, replacement in names:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise AssertionError(f"no rule for {name}")


def spread(model):
    """Weights far from their first values, and different in every parameter: a wrong wiring shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def by_head(rows, n_head):
    """Rows of a fused product in our order (each head's q, k, v) from GPT-2's (all q, all k, all v)."""
    q, k, v = (part.chunk(n_head) for part in rows.chunk(3))
    return torch.cat([part for head in zip(q, k, v, strict=True) for part in head])


def gpt_pair(tied):
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=BLOCK, n_layer=2, n_head=4, n_embd=64, tie_word_embeddings=tied,
        attn_implementation="sdpa", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    reference = spread(GPT2LMHeadModel(config))
    module = models.load("gpt")
    ours = module.build(module.Config(VOCAB, BLOCK, n_layer=2, n_head=4, n_embd=64, tied=tied))
    # Hugging Face's GPT-2 keeps its four products transposed (Conv1D).
    turned = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
    state = {
        renamed(name, GPT_NAMES): value.T if turned.search(name) else value
        for name, value in reference.state_dict().items()
    }
    state |= {name: by_head(value, 4) for name, value in state.items() if ".qkv." in name}
    ours.load_state_dict(state)
    return ours, reference


def llama_pair(n_kv_head, theta, tied):
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=BLOCK, num_hidden_layers=2, num_attention_heads=4, hidden_size=64,
        num_key_value_heads=n_kv_head, intermediate_size=96, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="sdpa",
    )  # fmt: skip
    reference = spread(LlamaForCausalLM(config))
    module = models.load("llama")
    sizes = module.Config(VOCAB, BLOCK, 2, 4, n_kv_head, n_embd=64, n_ffn=96, rope_theta=theta, tied=tied)
    ours = module.build(sizes)
    ours.load_state_dict({renamed(name, LLAMA_NAMES): value for name, value in reference.state_dict().items()})
    return ours, reference


PAIRS = {
    "gpt-tied": lambda: gpt_pair(True),
    "gpt-untied": lambda: gpt_pair(False),
    "llama-all-heads": lambda: llama_pair(4, 500000.0, False),
    "llama-grouped": lambda: llama_pair(2, 500000.0, False),
    "llama-one-kv-head": lambda: llama_pair(1, 10000.0, False),
    "llama-tied": lambda: llama_pair(2, 10000.0, True),
}


def test_a_contiguous_half_of_the_fused_rows_is_half_of_the_heads():
    """What tensor parallelism cuts: the halves' outputs add up to the whole's, forward and backward."""
    module = models.load("gpt")
    torch.manual_seed(0)
    whole = module.Attention(module.Config(n_embd=64, n_head=4), causal=True).double()
    x = torch.randn(2, BLOCK, 64, dtype=torch.double, requires_grad=True)
    total = whole.out.bias
    for half in (0, 1):
        shard = module.Attention(module.Config(n_embd=64, n_head=4), causal=True).double()
        shard.qkv = torch.nn.Linear(64, 96, dtype=torch.double)
        shard.out = torch.nn.Linear(32, 64, bias=False, dtype=torch.double)
        shard.qkv.weight.data = whole.qkv.weight.detach().chunk(2)[half]
        shard.qkv.bias.data = whole.qkv.bias.detach().chunk(2)[half]
        shard.out.weight.data = whole.out.weight.detach().chunk(2, dim=1)[half]
        total = total + shard(x)
    expected = whole(x)
    torch.testing.assert_close(total, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent) for y in (total, expected)))


@pytest.mark.parametrize("name", PAIRS)
def test_logits_and_gradients_are_the_reference(name):
    torch.manual_seed(0)
    ours, reference = PAIRS[name]()
    tokens = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    got, expected = ours(tokens), reference(tokens).logits
    error = (got - expected).abs().max().item()
    print(f"{name}: largest logit {expected.abs().max():.2f}, largest error {error:.2e}")
    assert expected.abs().max() > 1
    assert error < 1e-4
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)) / got.numel()
    got.backward(cotangent)
    expected.backward(cotangent)
    ours_grad, reference_grad = ours.embed.weight.grad, reference.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours_grad, reference_grad, rtol=1e-3, atol=1e-5 * reference_grad.abs().max().item())
