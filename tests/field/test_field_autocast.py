"""Emulated FP16 goes by CUDA autocast's lists, operator by operator. The lists are torch's own.

Oracle of an FP16 entry: the FP32 operator on operands that were rounded to FP16, its result rounded. A product is that
bit for bit or one unit in the last place off (2^-10 of the value), where kernels sum in another order; a cell or a
chain rounds between its products, so of those the bound is 2^-8 of the largest value.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.autocast_test_lists import AutocastTestLists

from mptrain import Precision
from mptrain.formats import Format
from mptrain.precision.backends.emulated import autocast_lists
from mptrain.precision.backends.emulated.rounding import Rounded

# torch's test helpers forbid the whole process to set flags of a backend, which every run does.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:Using torch.cross without"),
]

ULP = 2.0**-10
CHAINS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "chain_matmul", "linalg_multi_dot")
MODULES = {"nn_fp16": torch._C._nn, "nn_fp32": torch._C._nn, "linalg_fp16": torch._C._linalg}


def half() -> Rounded:
    return Rounded(Format.fp16, "cpu")


def entries(*lists: str):
    """(operator, its arguments, keywords, module) of torch's lists, without what only CUDA has."""
    torch.manual_seed(0)
    every = AutocastTestLists("cpu")
    found = []
    for which in lists:
        for place, (name, args, *rest) in enumerate(getattr(every, which)):
            if name.startswith("cudnn"):
                continue
            if name == "einsum":  # torch's entry has matrices for an equation of four dimensions
                args, rest = ("ij,jk->ik", *rest[0]), []
            kwargs = rest[0] if rest and isinstance(rest[0], dict) else {}
            found.append(pytest.param(which, name, args, kwargs, id=f"{name}-{place}"))
    return found


def call(which, name, args, kwargs):
    if which.startswith("methods"):
        return getattr(args[0], name)(*args[1:], **kwargs)
    place = MODULES.get(which, torch)
    function = getattr(place, name, None) or getattr(torch.ops.aten, name)
    return function(*args, **kwargs)


def each(values, change):
    if isinstance(values, torch.Tensor):
        return change(values) if values.is_floating_point() else values
    return type(values)(each(v, change) for v in values) if isinstance(values, list | tuple) else values


def results(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize(
    ("which", "name", "args", "kwargs"), entries("torch_fp16", "nn_fp16", "linalg_fp16", "methods_fp16")
)
def test_the_fp16_list(which, name, args, kwargs):
    wanted = call(which, name, each(args, lambda x: x.half().float()), kwargs)
    with half():
        got = call(which, name, args, kwargs)
    for ours, right in zip(results(got), results(wanted), strict=True):
        assert ours.dtype is torch.float16
        right = right.half().float()
        bound = 4 * ULP * right.abs().max() if name in CHAINS else ULP * right.abs() + 2.0**-24
        assert ((ours.float() - right).abs() <= bound).all(), (ours.float() - right).abs().max()
        if name not in CHAINS:
            assert not torch.equal(ours.float(), call(which, name, args, kwargs)) or name == "prelu"


@pytest.mark.parametrize(("which", "name", "args", "kwargs"), entries("torch_fp32", "nn_fp32", "methods_fp32"))
def test_the_fp32_list(which, name, args, kwargs):
    inputs = each(args, torch.Tensor.half)
    wanted = call(which, name, each(inputs, torch.Tensor.float), kwargs)
    with half():
        got = call(which, name, inputs, kwargs)
    assert got.dtype is torch.float32
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("which", "name", "args", "kwargs"),
    entries("torch_need_autocast_promote", "torch_expect_builtin_promote", "methods_expect_builtin_promote"),
)
def test_what_promotes(which, name, args, kwargs):
    wanted = call(which, name, each(args, torch.Tensor.float), kwargs)
    with half():
        got = call(which, name, args, kwargs)
    if isinstance(got, bool):
        assert got == wanted
    else:
        assert got.dtype is wanted.dtype
        assert torch.equal(got, wanted)


def test_our_table_is_that_of_torch():
    cuda = {name.removeprefix("aten::") for name in autocast_lists.registered("AutocastCUDA")}
    ours = [*autocast_lists.HALF, *autocast_lists.FLOAT, *autocast_lists.FLOAT_RESULT, *autocast_lists.NORMS]
    ours += [*autocast_lists.PROMOTE, *autocast_lists.BANNED]
    assert len(ours) == len(set(ours))
    assert set(ours) == {name for name in cuda if not name.startswith("cudnn")}


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: F.avg_pool3d(x.view(1, 4, 4, 4), 2), lambda x: torch.stack([x, x]), lambda x: torch.cat([x, x]),
        lambda x: F.pad(x.view(1, 8, 8), (1, 1), mode="reflect"), lambda x: torch.trace(x),
        lambda x: F.max_pool3d(x.view(1, 4, 4, 4), 2), F.gelu, torch.tanh, torch.mean,
    ],
)  # fmt: skip
def test_what_only_the_cpus_autocast_casts_is_left_alone(operator):
    x = torch.randn(8, 8).half()
    with half():
        got = operator(x)
    assert got.dtype is torch.float16
    assert torch.allclose(got.float(), operator(x.float()), rtol=ULP, atol=2.0**-14)


def test_overflow_of_fp32_operators():
    """Finite in FP32, Inf in FP16: the sums, norms and powers of CUDA autocast's FP32 list."""
    x = torch.full((64,), 200.0, dtype=torch.float16)
    with half():
        found = [x.sum() * 10, x.norm() * 100, (x**2)[0], torch.linalg.vector_norm(x) * 100, x.cumprod(0)[2]]
        found += [torch.linalg.norm(x.view(8, 8), ord="fro") * 100, F.huber_loss(x, -x), F.cosine_similarity(x, x, 0)]
    assert all(y.dtype is torch.float32 and y.isfinite().all() for y in found)
    assert found[-1].item() == pytest.approx(1.0)


def test_banned_as_under_cuda():
    with half(), pytest.raises(RuntimeError, match=r"unsafe to autocast.*BCEWithLogitsLoss"):
        F.binary_cross_entropy(torch.rand(4), torch.rand(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_other_dtypes_pass(dtype):
    a, b = torch.randn(8, 8, dtype=dtype) * 100, torch.randn(8, 8, dtype=dtype) * 1e6
    products = torch.mm, torch.matmul, torch.mul, lambda x, y: torch.einsum("ij,jk->ik", x, y), lambda x, y: y.sum() + x
    wanted = [product(a, b) for product in products]
    for name in ("fp16", "tf32"):
        with Rounded(Format[name], "cpu"):
            found = [product(a, b) for product in products]
        assert all(x.dtype is dtype and torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_out_goes_uncast_as_under_cuda():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    out, narrow = torch.empty(8, 8), torch.empty(8, 8, dtype=torch.float16)
    with half():
        assert torch.mm(a, b, out=out) is out
        assert torch.mm(a.half(), b.half(), out=narrow) is narrow
        with pytest.raises(RuntimeError):
            torch.mm(a, b.half(), out=torch.empty(8, 8))
    assert torch.equal(out, torch.mm(a, b))
    assert torch.equal(narrow, torch.mm(a.half().float(), b.half().float()).half())


@pytest.mark.parametrize("name", ["addmm_", "addmv_", "baddbmm_", "addbmm_"])
def test_in_place_products_of_halves(name):
    torch.manual_seed(0)
    shape = {"addmv_": ((4,), (4, 8), (8,)), "baddbmm_": ((2, 4, 4), (2, 4, 8), (2, 8, 4))}
    shape |= {"addmm_": ((4, 4), (4, 8), (8, 4)), "addbmm_": ((4, 4), (2, 4, 8), (2, 8, 4))}
    x, a, b = (torch.randn(s).half() for s in shape[name])
    wanted = getattr(x.float(), name)(a.float(), b.float()).half()
    with half():
        got = getattr(x, name)(a, b)
    assert got is x
    assert torch.equal(x, wanted)


def test_inner_autocasts_rule():
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    layer = nn.LayerNorm(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = torch.mm(a, b), layer(torch.mm(a, b)), torch.mm(a, b).softmax(0), torch.stack([a, a.bfloat16()])
    with half():
        with torch.autocast("cpu", enabled=False):
            off = torch.mm(a, b), layer(a), F.linear(a, b), torch.einsum("ij,jk", a, b)
            assert a.half().softmax(0).dtype is torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.mm(a, b), layer(torch.mm(a, b)), torch.mm(a, b).softmax(0), torch.stack([a, a.bfloat16()])
        assert torch.mm(a, b).dtype is torch.float16
    assert all(x.dtype is y.dtype and torch.equal(x, y) for x, y in zip(alone, inside, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(off, (a @ b, layer(a), F.linear(a, b), a @ b), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # and afterwards nothing is left
        after = torch.mm(a, b), layer(torch.mm(a, b)), torch.mm(a, b).softmax(0), torch.stack([a, a.bfloat16()])
    assert all(torch.equal(x, y) for x, y in zip(alone, after, strict=True))


def test_the_default_dtype_is_no_matter():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        for name in ("fp16", "tf32"):
            with Rounded(Format[name], "cpu"):
                got = torch.mm(a, b), torch.mm(a.double(), b.double())
            assert got[0].dtype is (torch.float16 if name == "fp16" else torch.float32)
            assert torch.equal(got[1], a.double() @ b.double())
    finally:
        torch.set_default_dtype(torch.float32)


def test_modules_of_torch_amp():
    """custom_fwd and custom_bwd see the autocast that runs."""

    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a.mm(b)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad.mm(b.t()), a.t().mm(grad)

    model = nn.Linear(8, 8)
    weight = model.weight
    precision = Precision("fp16").prepare(model)
    x = torch.randn(4, 8)
    with precision.forward():
        out = Double.apply(x, weight)
        loss = out.float().mean() + 0 * model(x).sum()
    assert out.dtype is torch.float16
    precision.backward(loss)
    wanted = x.half().float().t().mm(torch.full((4, 8), 1 / 32))
    assert torch.allclose(weight.grad / precision.scaler.scale, wanted, rtol=ULP, atol=1e-7)
