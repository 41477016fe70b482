"""Emulated FP16 and TF32 reach whatever multiplies: recurrent layers, attention, recomputation, gradients of gradients.

Oracles: the FP32 run of the same model (relative error of all gradients together: FP16 and TF32 keep 11 bits, so one
rounding is 2^-11 = 5e-4, and a product left in FP32 shows as a difference of 0), and the run without recomputation.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mptrain import Precision
from mptrain.telemetry.audit import StepAudit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:LSTM with projections is not supported with oneDNN",
        "ignore:torch.chain_matmul is deprecated",
        "ignore:`gradient_checkpointing_enable` is deprecated",
        "ignore:`torch.jit.script` is deprecated",
    ),
]

NAMES = ("tf32", "fp16")
WIDTH, LENGTH, BATCH = 16, 8, 4
SCALE = 2.0**-14  # of the loss: FP16's first loss scale is 2^16, and a real loss of 1 overflows by design


class Head(nn.Module):
    """A linear layer, then something of every kind that CUDA autocast takes after it."""

    def __init__(self, then, *parts):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(parts)
        self.then = then

    def forward(self, x):
        return self.then(self.linear(x), x, *self.parts)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def recurrent(kind, **kwargs):
    return Head(lambda h, x, r: first(r(h)), getattr(nn, kind)(WIDTH, WIDTH, batch_first=True, **kwargs))


def packed(h, x, r):
    sequence = nn.utils.rnn.pack_padded_sequence(h, [8, 7, 5, 2], batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(r(sequence)[0], batch_first=True)[0]


def in_place(h, x):
    h = F.relu(h, inplace=True) + 0
    h += x.to(h.dtype)
    h[:, 0] = 0
    return F.dropout(h, 0.0, inplace=True)


def grid(h, x):
    where = torch.linspace(-1, 1, 32).reshape(1, 4, 4, 2).expand(BATCH, -1, -1, -1)
    return F.grid_sample(h[:, None], where, align_corners=False)


def products(h, x, linear):
    weight = linear.weight
    chain = torch.linalg.multi_dot([h[0], weight, weight]) + torch.chain_matmul(h[0], weight, weight)
    batched = torch.einsum("bij,kj->bik", h, weight) + torch.addbmm(chain, h, h.transpose(1, 2) @ h)
    return batched + chain + torch.linalg.matmul(h, weight) + torch.addmv(h[0, 0], weight, h[0, 0])


MODELS = {
    "lstm": lambda: recurrent("LSTM"),
    "lstm-2-both-ways": lambda: recurrent("LSTM", num_layers=2, bidirectional=True),
    "lstm-projected": lambda: recurrent("LSTM", proj_size=8),
    "gru": lambda: recurrent("GRU"),
    "rnn-tanh": lambda: recurrent("RNN"),
    "rnn-relu": lambda: recurrent("RNN", nonlinearity="relu"),
    "gru-packed": lambda: Head(packed, nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "lstm-cell": lambda: Head(lambda h, x, r: r(h[:, 0])[0], nn.LSTMCell(WIDTH, WIDTH)),
    "gru-cell": lambda: Head(lambda h, x, r: r(h[:, 0]), nn.GRUCell(WIDTH, WIDTH)),
    "rnn-cell": lambda: Head(lambda h, x, r: r(h[:, 0]), nn.RNNCell(WIDTH, WIDTH)),
    "attention": lambda: Head(
        lambda h, x, a: a(h, h, h, need_weights=False)[0], nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    ),
    "attention-weights": lambda: Head(lambda h, x, a: a(h, h, h)[0], nn.MultiheadAttention(WIDTH, 4, batch_first=True)),
    "encoder": lambda: Head(
        lambda h, x, e: e(h), nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
    ),
    "conv1d": lambda: Head(
        lambda h, x, a, b: b(torch.tanh(a(h))), nn.Conv1d(LENGTH, 16, 3), nn.ConvTranspose1d(16, LENGTH, 3)
    ),
    "conv2d": lambda: Head(
        lambda h, x, a, n, b: b(n(a(h[:, None]))), nn.Conv2d(1, 8, 3, padding="same"), nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3, groups=2),
    ),
    "prelu": lambda: Head(lambda h, x, p: p(h), nn.PReLU()),
    "bilinear": lambda: Head(lambda h, x, b: b(F.silu(h), x), nn.Bilinear(WIDTH, WIDTH, 4)),
    "in-place": lambda: Head(in_place),
    "grid_sample": lambda: Head(grid),
    "cdist": lambda: Head(lambda h, x: torch.cdist(h, x)),
    "multi_margin": lambda: Head(lambda h, x: F.multi_margin_loss(h[:, 0], torch.tensor([1, 2, 3, 4]))),
    "dot": lambda: Head(lambda h, x: torch.dot(h[0, 0], x[1, 1])),
    "scatter_add": lambda: Head(lambda h, x: torch.zeros_like(x).scatter_add(1, torch.zeros(x.shape).long(), h)),
    "index_put": lambda: Head(lambda h, x: torch.zeros_like(x).index_put((torch.arange(4),), h)),
    "products": lambda: Head(products, nn.Linear(WIDTH, WIDTH)),
    "interpolate": lambda: Head(lambda h, x: F.interpolate(h[:, None], scale_factor=2, mode="bilinear")),
    "unfold": lambda: Head(lambda h, x: F.fold(F.unfold(h[:, None], 3), (LENGTH, WIDTH), 3)),
}  # fmt: skip
FLOAT_OUT = {"encoder", "bilinear", "grid_sample", "cdist", "multi_margin", "dot", "scatter_add", "index_put",
             "interpolate"}  # fmt: skip


def gradients(name: str, model: nn.Module, run=None) -> tuple[torch.Tensor, torch.dtype]:
    precision = Precision(name).prepare(model)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with precision.forward():
        out = model(x) if run is None else run(model, x)
        loss = out.float().square().mean() * SCALE
    precision.backward(loss)
    scale = precision.scaler.scale if precision.scaler.active else 1.0
    return torch.cat([p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]), out.dtype


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_layer_trains_as_in_fp32_to_rounding(kind):
    right, _ = gradients("fp32", built(kind))
    for name in NAMES:
        found, dtype = gradients(name, built(kind))
        assert 1e-5 < distance(found, right) < 3e-3
        assert dtype is (torch.float16 if name == "fp16" and kind not in FLOAT_OUT else torch.float32)


class Products(TorchDispatchMode):
    """Operands of what runs beneath the emulation: (name, is each on the grid of 10 mantissa bits?)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[bool]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        places = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "convolution": (0, 1)}
        places["convolution_backward"] = (0, 1, 2)
        if name in places:
            self.seen.append((name, [not (args[i].view(torch.int32) & 0x1FFF).any() for i in places[name]]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("cdist", "dot")])
@pytest.mark.parametrize("name", NAMES)
def test_no_product_is_left_unrounded(name, kind):
    """In forward and backward, and in evaluation, where torch would take its fused encoder and oneDNN's LSTM."""
    model = built(kind)
    with Products() as products:
        gradients(name, model)
    assert len(products.seen) >= 2
    assert all(all(rounded) for _, rounded in products.seen), products.seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lstm", "gru", "encoder", "attention"])
def test_evaluation_computes_what_training_does(name, kind):
    """torch's fast paths for evaluation multiply out of sight."""
    model = built(kind).eval()
    precision = Precision(name).prepare(model)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with precision.forward():
        wanted = model(x)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard(), Products() as products, precision.evaluating():
            assert distance(model(x).float(), wanted.float()) < 5e-5  # inference mode sums some in another order
        assert len(products.seen) > 1
        assert all(all(rounded) for _, rounded in products.seen)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "encoder", "conv2d", "prelu"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_is_bit_equal(name, kind, reentrant):
    def recomputed(model, x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    plain, dtype = gradients(name, built(kind), lambda model, x: model(x.requires_grad_()))
    again, same = gradients(name, built(kind), recomputed)
    assert torch.equal(plain, again)
    assert dtype is same


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_hugging_faces_checkpointing_is_bit_equal(name, reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        precision = Precision(name).prepare(model)
        with precision.forward():
            loss = model(input_ids=tokens, labels=tokens).loss * SCALE
        precision.backward(loss)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_is_right_to_rounding(name, inside):
    """torch.amp's recipe takes the gradient outside of autocast; inside of it is as good."""

    def penalty(policy):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        precision = Precision(policy).prepare(model)
        x = torch.randn(16, 32, requires_grad=True)
        with precision.forward():
            total = model(x).float().sum()
            if inside:
                (grad,) = torch.autograd.grad(total, x, create_graph=True)
        if not inside:
            (grad,) = torch.autograd.grad(total, x, create_graph=True)
        with precision.forward():
            loss = (grad.float().norm(dim=1) - 1).square().mean() * 2.0**-8
        precision.backward(loss)
        scale = precision.scaler.scale if precision.scaler.active else 1.0
        return torch.cat([p.grad.flatten() / scale for p in model.parameters() if p.grad is not None])

    assert 1e-5 < distance(penalty(name), penalty("fp32")) < 1e-3


@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_computes_the_same(name, compiled_first):
    """torch.compile leaves a frame alone while a dispatch mode is on: uncompiled, and right."""
    model = built("prelu")
    precision = Precision(name).prepare(model)
    forward = torch.compile(model, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    plain = model(x)
    if compiled_first:
        assert torch.allclose(forward(x), plain, atol=1e-6)
    with precision.forward():
        wanted, got = model(x), forward(x)
    assert torch.equal(wanted, got)
    assert wanted.dtype is got.dtype
    assert torch.allclose(forward(x), plain, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_local_products_of_distributed_tensors_are_rounded(name, tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(WIDTH, WIDTH, bias=False)
        precision = Precision(name).prepare(model)
        x = torch.randn(4, WIDTH)
        with precision.forward():
            wanted = torch.mm(x, model.weight)
            got = torch.mm(
                distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(model.weight.detach(), mesh, [Replicate()])
            )
        assert isinstance(got, DTensor)
        assert torch.equal(got.to_local(), wanted)
        assert got.dtype is wanted.dtype
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("name", NAMES)
def test_nested_tensors_are_rounded_or_refused(name):
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    precision = Precision(name).prepare(model)
    parts = [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    with precision.forward():
        wanted = torch.cat([model(part) for part in parts])
        got = model(torch.nested.nested_tensor(parts, layout=torch.jagged)).values()
        with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
            model(torch.nested.nested_tensor(parts))
    assert torch.allclose(got, wanted, rtol=2.0**-10, atol=1e-6)
    assert got.dtype is wanted.dtype


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jacrev", "script"])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_are_rounded_too(name, transform):
    """torch.func's transforms and scripted modules reach the same products."""
    torch.manual_seed(0)
    x, w = torch.randn(8, WIDTH), torch.randn(WIDTH, WIDTH)
    scripted = torch.jit.script(nn.Linear(WIDTH, WIDTH, bias=False)) if transform == "script" else nn.Identity()
    run = {
        "vmap": lambda: torch.func.vmap(lambda row: row @ w)(x),
        "grad": lambda: torch.func.grad(lambda a: (x @ a).float().square().mean())(w),
        "jvp": lambda: torch.func.jvp(lambda a: x @ a, (w,), (torch.ones_like(w),))[1],
        "jacrev": lambda: torch.func.jacrev(lambda a: (x @ a).float().sum(0))(w),
        "script": lambda: scripted(x).detach(),
    }[transform]
    right = run()
    with Precision(name).prepare(nn.Linear(1, 1)).forward():
        got = run()
    assert 1e-5 < distance(got.float(), right) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_product_is_named(name):
    with torch.library._scoped_library("field", "DEF") as library:
        library.define("product(Tensor a, Tensor b) -> Tensor")
        library.impl("product", lambda a, b: (a.double() @ b.double()).to(a.dtype), "CompositeExplicitAutograd")
        model = Head(lambda h, x: h + torch.ops.field.product(x[0].detach(), torch.eye(WIDTH)))
        precision = Precision(name).prepare(model)
        with StepAudit(model, precision) as step:
            with precision.forward():
                loss = model(torch.randn(BATCH, LENGTH, WIDTH)).float().mean() * SCALE
            precision.backward(loss)
    assert step.result is not None
    (problem,) = step.result.problems()
    assert problem == "field.product in (model) may multiply matrices, in fp32: nothing rounds there"
