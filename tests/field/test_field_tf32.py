"""Emulated TF32 rounds the FP32 operands of matrix products and convolutions, and nothing else.

The oracle rounds with integers: to nearest, ties to even, of the 13 bits that TF32's mantissa has not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mptrain import Precision
from mptrain.formats import Format
from mptrain.precision.backends.emulated.rounding import Rounded

pytestmark = pytest.mark.usefixtures("one_thread")


def tf32() -> Rounded:
    return Rounded(Format.tf32, "cpu")


def rounded(x: torch.Tensor) -> torch.Tensor:
    bits = x.detach().contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


A, B, C = numbers(8, 16), numbers(16, 8, seed=1), numbers(8, 8, seed=2)
A3, B3, C3 = numbers(2, 8, 16), numbers(2, 16, 8, seed=1), numbers(2, 8, 8, seed=2)
IMAGE, KERNEL, BIAS = numbers(2, 4, 9, 9), numbers(6, 4, 3, 3, seed=1), numbers(6, seed=2)

ROUNDED = {
    "mm": (torch.mm, (A, B), (0, 1)),
    "matmul": (torch.matmul, (A, B), (0, 1)),
    "matmul-batch": (torch.matmul, (A3, B), (0, 1)),
    "bmm": (torch.bmm, (A3, B3), (0, 1)),
    "addmm": (torch.addmm, (C, A, B), (1, 2)),
    "addmm-beta": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), (C, A, B), (1, 2)),
    "baddbmm": (torch.baddbmm, (C3, A3, B3), (1, 2)),
    "addbmm": (torch.addbmm, (C, A3, B3), (1, 2)),
    "linear": (F.linear, (A, B.t().contiguous(), C[0]), (0, 1)),
    "inner": (torch.inner, (A, A), (0, 1)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (A, B), (0, 1)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (A3, B3), (0, 1)),
    "conv1d": (F.conv1d, (IMAGE[:, :, 0], KERNEL[..., 0], BIAS), (0, 1)),
    "conv2d": (F.conv2d, (IMAGE, KERNEL, BIAS), (0, 1)),
    "conv2d-same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), (IMAGE, KERNEL, BIAS), (0, 1)),
    "conv3d": (F.conv3d, (IMAGE[None], KERNEL[:, :2, None], BIAS), (0, 1)),
    "conv_transpose2d": (F.conv_transpose2d, (IMAGE, KERNEL.transpose(0, 1).contiguous(), BIAS), (0, 1)),
    "conv_tbc": (torch.conv_tbc, (numbers(7, 2, 4), numbers(3, 4, 6), BIAS), (0, 1)),
    "pinv-inside": (lambda a: torch.linalg.pinv(a), (A,), None),
    "cdist-by-products": (torch.cdist, (numbers(40, 8), numbers(40, 8, seed=1)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_operands_are_rounded_and_addends_are_not(name):
    function, args, operands = ROUNDED[name]
    with tf32():
        got = function(*args)
    assert got.dtype is torch.float32
    if operands is None:  # rounded somewhere inside: known by not being FP32's
        assert 1e-6 < float((got - function(*args)).norm() / got.norm()) < 1e-2
        return
    wanted = function(*[rounded(x) if place in operands else x for place, x in enumerate(args)])
    assert torch.allclose(got, wanted, rtol=0.0, atol=float(4 * 2.0**-23 * wanted.abs().max()))
    assert not torch.allclose(got, function(*args), rtol=0.0, atol=float(2.0**-18 * wanted.abs().max()))


UNROUNDED = {
    "mv": (torch.mv, (A, B[:, 0])),
    "dot": (torch.dot, (A[0], B[:, 0])),
    "addmv": (torch.addmv, (C[0], A, B[:, 0])),
    "addr": (torch.addr, (C, C[0], C[1])),
    "mul": (torch.mul, (C, C)),
    "softmax": (lambda x: x.softmax(0), (C,)),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), (C,)),
    "float64": (torch.mm, (A.double(), B.double())),
    "complex64": (torch.mm, (torch.complex(A, A), torch.complex(B, B))),
    "half": (torch.mm, (A.half(), B.half())),
    "bfloat16": (torch.mm, (A.bfloat16(), B.bfloat16())),
    "sparse": (torch.sparse.mm, (C.relu().to_sparse(), C)),
    "int64": (torch.mm, (A.long(), B.long())),
    "add": (torch.add, (C, C)),
}


@pytest.mark.parametrize("name", UNROUNDED)
def test_what_no_tf32_unit_takes_stays_as_it_is(name):
    function, args = UNROUNDED[name]
    with tf32():
        got = function(*args)
    assert torch.equal(got, function(*args))


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -1e30, -3.3333333])
def test_attention_masks_and_alibi_stay(mask):
    q, k, v = (numbers(1, 2, 16, 8, seed=seed) for seed in range(3))
    bias = torch.zeros(1, 2, 16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), mask) + numbers(16, 16) / 3
    with tf32():
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        scores = torch.baddbmm(bias[0], q[0], k[0].transpose(1, 2))
    assert torch.equal(fused, F.scaled_dot_product_attention(rounded(q), rounded(k), rounded(v), attn_mask=bias))
    assert torch.equal(scores, torch.baddbmm(bias[0], rounded(q[0]), rounded(k[0]).transpose(1, 2)))
    assert fused.isfinite().all()


@pytest.mark.parametrize("name", ["out", "in-place"])
def test_results_written_in_place(name):
    out = C.clone()
    with tf32():
        if name == "out":
            assert torch.mm(A, B, out=out) is out
        else:
            out.addmm_(A, B)
    wanted = rounded(A) @ rounded(B) if name == "out" else torch.addmm(C, rounded(A), rounded(B))
    assert torch.allclose(out, wanted, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d", "conv_tbc"])
def test_backward_rounds_grad_output_but_not_the_biass_gradient(kind):
    functions = {
        "linear": (F.linear, (A, B.t().contiguous(), C[0])),
        "conv2d": (F.conv2d, (IMAGE, KERNEL, BIAS)),
        "conv_transpose2d": (F.conv_transpose2d, (IMAGE, KERNEL.transpose(0, 1).contiguous(), BIAS)),
        "conv_tbc": (torch.conv_tbc, (numbers(7, 2, 4), numbers(3, 4, 6), BIAS)),
    }
    function, args = functions[kind]
    leaves = [x.clone().requires_grad_() for x in args]
    precision = Precision("tf32").prepare(nn.Linear(1, 1))
    with precision.forward():
        out = function(*leaves)
    cotangent = numbers(*out.shape, seed=9)
    with precision.backend.backward():
        out.backward(cotangent)
    oracle = [rounded(x).requires_grad_() for x in args]
    function(*oracle).backward(rounded(cotangent))
    bias = args[2].clone().requires_grad_()
    function(args[0], args[1], bias).backward(cotangent)
    for leaf, right in zip(leaves, (oracle[0].grad, oracle[1].grad, bias.grad), strict=True):
        assert torch.allclose(leaf.grad, right, rtol=0.0, atol=float(8 * 2.0**-23 * right.abs().max()))


def test_double_backward_of_a_product_is_that_of_rounded_operands():
    """grad(grad(x @ w)): every product of it has rounded operands, and no factor is taken for a constant."""
    x, w = A.clone().requires_grad_(), B.clone().requires_grad_()
    precision = Precision("tf32").prepare(nn.Linear(1, 1))
    with precision.forward():
        (first,) = torch.autograd.grad((x @ w).square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, w))
    x64, w64 = A.double().requires_grad_(), B.double().requires_grad_()
    (first,) = torch.autograd.grad((x64 @ w64).square().sum(), x64, create_graph=True)
    for got, wanted in zip(second, torch.autograd.grad(first.square().sum(), (x64, w64)), strict=True):
        error = float((got - wanted).norm() / wanted.norm())
        assert 1e-5 < error < 1e-3


def test_subnormals_infinities_and_nan():
    special = torch.tensor([[2.0**-149, -(2.0**-130), torch.inf], [torch.nan, -torch.inf, torch.finfo().max]])
    with tf32():
        got = torch.mm(special, torch.eye(3))
    wanted = torch.mm(rounded(special), torch.eye(3))
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
