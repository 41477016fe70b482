"""Bytes of weights, cache and activations against models that hold them; GPUs and batches against their definitions."""

import random
import warnings
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain.memory.inference import catalogue
from mptrain.memory.inference.architecture import Part
from mptrain.memory.inference.article import article
from mptrain.memory.inference.huggingface import from_config
from mptrain.memory.inference.plan import Request, activations, kv_bytes, largest_batch, plan, plan_count
from mptrain.memory.inference.weights import FORMATS, KEEP, weigh, weight_format
from mptrain.memory.units import gb, gib, parse_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers import AutoConfig, AutoModelForCausalLM

GIB = 2**30
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 51,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SCALES = {  # format -> (bits of an element, bytes of the scales of a matrix), written down once more
    "fp8": (8, lambda r, c: 4 * r),
    "fp8-block": (8, lambda r, c: 4 * -(-r // 128) * -(-c // 128)),
    "int8": (8, lambda r, c: 4 * r),
    "int4": (4, lambda r, c: 2 * r * -(-c // 128)),
    "mxfp8": (8, lambda r, c: r * -(-c // 32)),
    "mxfp4": (4, lambda r, c: r * -(-c // 32)),
    "nvfp4": (4, lambda r, c: r * -(-c // 16) + 4),
}


def twin(kind, **settings):
    """(transformers' model on the meta device, our architecture of it)."""
    config = AutoConfig.for_model(kind, **(SMALL | settings))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), from_config(config.to_dict(), kind)


def stored(model, bits, scales, kept):
    """Bytes of a model with its linear layers quantized but those that ``kept(name)`` names; the rest in 16 bits."""
    linears = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not kept(n)}
    size = 0
    for parameter in model.parameters():
        if id(parameter) in linears:
            size += -(-parameter.numel() * bits // 8) + scales(*parameter.shape)
        else:
            size += 2 * parameter.numel()
    return size


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", SCALES)
def test_weights_take_the_bytes_of_their_tensors(name, kind):
    bits, scales = SCALES[name]
    for tied in (False, True):
        model, ours = twin(kind, tie_word_embeddings=tied)
        found = weigh(ours.parts(), weight_format(name), KEEP, "bf16")
        assert found.total == stored(model, bits, scales, lambda layer: layer == "lm_head")

        def kept(layer):
            return layer == "lm_head" or ".0." in layer or layer.endswith("k_proj")

        mixed = weigh(ours.parts(), weight_format(name), rf"{KEEP}|blocks\.0|blocks\..*\.k", "fp16")
        assert mixed.total == stored(model, bits, scales, kept)
        assert mixed.total > found.total


def test_wide_formats_take_their_width_and_know_no_scales():
    model, ours = twin("qwen2")
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, width in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        assert weigh(ours.parts(), FORMATS[name], KEEP, "bf16").total == width * count


def test_what_is_kept_goes_by_group_name_or_the_module_around_it():
    _, ours = twin("llama", tie_word_embeddings=True)

    def layers(keep):
        return weigh(ours.parts(), FORMATS["int8"], keep, "bf16").kept_layers

    assert layers("") == ()
    assert layers("head") == ("embed",), "tied"
    assert layers("attention") == tuple(f"blocks.*.attention.{x}" for x in ("q", "k", "v", "out"))
    assert layers(r"blocks\.1") == layers("attention") + layers("mlp")
    assert layers(r"blocks.*.mlp") == layers("mlp") == layers(r"blocks\.[012]\.mlp")
    for keep, wanted in (("lm_head", "matches no layer"), (".*", "keeps every layer"), ("(", "not a regular")):
        with pytest.raises(ValueError, match=wanted):
            layers(keep)


def test_int4_in_groups_of_128_is_half_a_byte_and_a_sixty_fourth_of_two():
    weights = plan_count(128 * 10**6, "int4", Request()).weights
    assert weights.total / (128 * 10**6) == 0.515625
    assert plan_count(128 * 10**6, "int4", Request(group_size=32)).weights.total / (128 * 10**6) == 0.5625


def test_the_published_checkpoint_of_deepseek_v3_has_the_planned_bytes():
    """163 files of 91,991 tensors, 688,586,727,753 bytes: FP8 in blocks of 128 x 128; the module for multi-token
    prediction beside what is planned: one layer more, a projection, three norms, copies of embedding and head."""
    model = catalogue.model("deepseek-v3").architecture
    main = weigh(model.parts(), FORMATS["fp8-block"], KEEP, "bf16").total
    last = [part for part in model.parts() if part.name.startswith("blocks.60.")]
    layer = weigh(last, FORMATS["fp8-block"], KEEP, "bf16").total
    beside = 2 * (14_336 * 7168 + 3 * 7168 + 2 * 129_280 * 7168)
    routing = 4 * 256 * 59  # biases in FP32
    headers = 688_586_727_753 - (main + layer + beside + routing)
    assert 100 < headers / 91_991 < 160, "name, dtype, shape and offsets of each tensor in JSON"


def test_the_article_to_the_digit():
    request = Request(batch=30, input_tokens=2048, output_tokens=2048, kv_format="fp8")
    model = catalogue.model("deepseek-r1")
    made = article(model.architecture, 671 * 10**9, 37 * 10**9, FORMATS["fp8"], request)
    assert (gb(made.weights), gb(made.activated), gib(made.kv_cache)) == ("671.00 GB", "37.00 GB", "100.08 GiB")
    assert f"{made.total:.2f}" == "808.08"
    assert made.kv_cache == 107_458_068_480
    assert made.bytes == 671 * 10**9 + 37 * 10**9 + 107_458_068_480
    exact = plan(model.architecture, "fp8", request)
    assert exact.roles["kv_cache"] == 30 * 4096 * 61 * (512 + 64)
    for name, shown in (("fp8", "0.931 GiB"), ("fp16", "1.863 GiB")):
        assert gib(plan_count(10**9, name, Request()).roles["weights"]) == shown
    dense = catalogue.model("llama-3-8b").architecture
    assert article(dense, 8 * 10**9, 8 * 10**9, FORMATS["fp8"], request).activated == 0


def test_the_cache_in_every_format():
    _, ours = twin("llama")
    elements = 3 * 100 * 2 * 2 * 16
    for name, width in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp8", 1)):
        assert kv_bytes(ours, 100, name) == width * elements
    scales = 3 * 100 * 2 * 2 * 2  # FP16, of each token's keys and values of each head
    assert kv_bytes(ours, 100, "int8") == elements + scales
    assert kv_bytes(ours, 100, "int4") == elements // 2 + scales
    for format_name, wanted in (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int4", "bf16")):
        assert plan(ours, format_name, Request()).kv_format == wanted


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _freed(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("kind", "batch", "tokens", "ffn"), [("llama", 2, 300, 800), ("qwen2", 1, 512, 1000)])
def test_a_prefill_keeps_the_planned_bytes_alive(kind, batch, tokens, ffn, one_thread):
    config = AutoConfig.for_model(kind, **(SMALL | {"hidden_size": 256, "intermediate_size": ffn, "vocab_size": 99}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad(), LiveBytes() as live:
        model(torch.randint(0, 99, (batch, tokens)), use_cache=False, logits_to_keep=1)
    planned = activations(from_config(config.to_dict(), kind), Request(batch, tokens, 0), 2)
    tables = 2 * tokens * 64 * 2  # cosines and sines of the rotary embedding, for all layers
    indices = 8 * tokens * (batch + 1)  # of tokens, and positions
    assert live.most == planned + tables + indices


def test_a_prefill_takes_tokens_in_pieces_and_every_sequence_once():
    _, ours = twin("llama", vocab_size=8)
    whole = activations(ours, Request(batch=4, input_tokens=1000), 2)
    assert activations(ours, Request(batch=4, input_tokens=1000, prefill=1000), 2) * 4 == whole
    assert activations(ours, Request(batch=4, input_tokens=1, prefill=1), 2) * 1000 == whole
    _, ours = twin("llama", vocab_size=10**6)
    assert activations(ours, Request(batch=7, input_tokens=1), 2) == 7 * 10**6 * 6 + 7 * 64 * 2, "logits"


@pytest.mark.parametrize("seed", range(12))
def test_batches_and_gpus_are_the_largest_and_the_fewest(seed):
    draw = random.Random(seed)
    model = catalogue.model(draw.choice(["llama-3-8b", "deepseek-r1", "mixtral-8x7b", "qwen2.5-72b"])).architecture
    name, memory = draw.choice([*FORMATS]), draw.choice([24, 80, 141]) * 10**9
    request = Request(
        batch=draw.randint(1, 200), input_tokens=draw.randint(1, 9000), output_tokens=draw.randint(0, 999)
    )
    made = plan(model, name, request)
    assert made.per_gpu(1) == made.total == sum(made.roles.values())
    splits = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
    for few, more in pairwise(splits):
        assert made.per_gpu(few) > made.per_gpu(more)
        assert made.gpus_needed(made.per_gpu(few)) == few, "to the byte"
        assert made.gpus_needed(made.per_gpu(few) - 1) == more
    assert made.gpus_needed(made.per_gpu(splits[-1]) - 1) is None
    gpus = draw.choice([1, 2, 4, 8, 16])
    largest = largest_batch(model, name, request, gpus, memory)
    if largest:
        assert plan(model, name, replace(request, batch=largest)).per_gpu(gpus) <= memory
    assert plan(model, name, replace(request, batch=largest + 1)).per_gpu(gpus) > memory


def test_heads_are_shared_between_gpus_and_latents_are_not():
    request = Request(batch=8, overhead=0)
    grouped, latent = (plan(catalogue.model(n).architecture, "bf16", request) for n in ("llama-3-8b", "deepseek-r1"))
    for made, whole in ((grouped, 0), (latent, latent.roles["kv_cache"])):
        rest = made.total - made.roles["activations"] - whole
        assert made.per_gpu(8) == pytest.approx(rest / 8 + whole + made.roles["activations"], abs=2)
    quarter = grouped.roles["kv_cache"] // 8  # 8 heads of keys on 16 GPUs: one on each
    assert grouped.per_gpu(16) == grouped.weights.total // 16 + quarter + grouped.roles["activations"]
    least = grouped.gpus_by_bytes(GIB)
    assert (least - 1) * GIB < grouped.total <= least * GIB
    assert replace(grouped, roles=grouped.roles | {"overhead": GIB}).gpus_by_bytes(GIB) is None


def test_only_learned_positions_end_a_sequence():
    gpt2, llama = (catalogue.model(name).architecture for name in ("gpt2", "llama-3-8b"))
    assert plan(gpt2, "fp16", Request(input_tokens=1000, output_tokens=24)).total
    with pytest.raises(ValueError, match=r"1,025 tokens, and gpt2 has 1,024 positions"):
        plan(gpt2, "fp16", Request(input_tokens=1000, output_tokens=25))
    assert plan(llama, "fp16", Request(input_tokens=8000, output_tokens=1000)).total


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch": 0}, "--batch=0"),
        ({"batch": -1}, "--batch=-1"),
        ({"batch": 10**12}, "--batch=1000000000000"),
        ({"input_tokens": 0}, "--input-tokens=0"),
        ({"output_tokens": -1}, "--output-tokens=-1"),
        ({"prefill": 0}, "--prefill=0"),
        ({"overhead": -1}, "--overhead=-1"),
        ({"group_size": 4}, "--group-size=4"),
        ({"kv_format": "fp9"}, "--kv-format=fp9 is unknown: did you mean"),
        ({"keep_format": "int8"}, "--keep-format=int8 is unknown"),
    ],
)
def test_a_request_that_cannot_be_names_its_option(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        Request(**settings)


def test_sizes_have_units():
    sizes = {"80GiB": 80 * 2**30, "80GB": 80 * 10**9, "80 GB": 80 * 10**9, "1.5TiB": 3 * 2**39, "0B": 0, "7KiB": 7168}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    assert parse_bytes("0.1GB") == 10**8, "no binary fraction in between"
    assert parse_bytes("0.0000000001GiB") == 0
    for text, wanted in (
        ("80", "has no unit: write 80GiB"),
        ("80G", "unknown unit"),
        ("80Gb", "unknown unit"),
        ("-1GiB", "from 0 B to 2"),
        ("9999999TB", "from 0 B to 2"),
        ("nanGB", "is not a size"),
        ("1e400GB", "is not a size"),
        ("", "is not a size"),
    ):
        with pytest.raises(ValueError, match=wanted):
            parse_bytes(text, "--fit")
    assert (gib(0), gib(2**30 - 1), gb(671 * 10**9)) == ("0.000 GiB", "1.000 GiB", "671.00 GB")


def test_a_part_counts_its_copies():
    part = Part("x", "experts", rows=3, columns=5, copies=4, vectors=7)
    assert (part.matrix_elements, part.elements) == (60, 67)
    assert weigh([part], FORMATS["int8"], "", "fp32").total == 4 * (15 + 12) + 28
    odd = weigh([part], FORMATS["int4"], "", "fp32")
    assert odd.quantized == 4 * 8, "each matrix ends on a whole byte"
