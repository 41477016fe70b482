"""Compressed gradients against FP64 means of what all ranks held, and the bill against what was really sent."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from mptrain.distributed import ALONE, World
from mptrain.distributed.compression import KINDS, Compression

pytestmark = pytest.mark.multi
SHAPES = {"first": (61, 83), "bias": (61,), "second": (40, 70), "scale": (7,)}  # no number of it is a multiple of 4
FEEDBACK = ["fp8", "powersgd"]


class Bucket:
    """What DDP hands a hook, made by hand: torch has no constructor for its own."""

    def __init__(self, parts, index=0, last=True):
        """``parts``: (parameter, gradient) in order."""
        self._parameters = [parameter for parameter, _ in parts]
        self._buffer = torch.cat([gradient.flatten() for _, gradient in parts])
        self._index, self._last = index, last

    def parameters(self):
        return self._parameters

    def buffer(self):
        return self._buffer

    def gradients(self):
        flat = self._buffer.split([p.numel() for p in self._parameters])
        return [part.view_as(p) for part, p in zip(flat, self._parameters, strict=True)]

    def index(self):
        return self._index

    def is_last(self):
        return self._last


def made(kind):
    """(compression, parameters by name) on this rank."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    return Compression(kind, World(), {p: name for name, p in parameters.items()}), parameters


def gradients(rank, step, common=1.0):
    """name -> gradient: of the layers' own magnitudes, 10^6 apart; ``common`` of it is the same on all ranks."""
    shared = torch.Generator().manual_seed(1000 + step)
    own = torch.Generator().manual_seed(100 * rank + step)
    sizes = {"first": 1.0, "bias": 1e-3, "second": 1e-6, "scale": 1e-4}
    return {
        name: sizes[name] * (common * torch.randn(shape, generator=shared) + torch.randn(shape, generator=own))
        for name, shape in SHAPES.items()
    }


def sent(compression, parameters, grads):
    """What arrived, by name: all of it in one bucket."""
    bucket = Bucket([(parameters[name], grads[name]) for name in SHAPES])
    result = compression.send(bucket).wait()
    assert result.dtype is torch.float32
    assert result.shape == bucket.buffer().shape
    return dict(zip(SHAPES, result.clone().split([p.numel() for p in parameters.values()]), strict=True))


def mean_of(size, step=0, common=1.0):
    """FP64, flat, by name."""
    all_of = [gradients(rank, step, common) for rank in range(size)]
    return {name: sum(one[name].double().flatten() for one in all_of) / size for name in SHAPES}


def sqnr(exact, found):
    return 10 * math.log10(exact.square().sum() / (found.double() - exact).square().sum())


def joined(by_name):
    return torch.cat([by_name[name].flatten() for name in SHAPES])


def one_step(rank, kind):
    compression, parameters = made(kind)
    compression.sampling = True
    for _ in range(3 if kind == "powersgd" else 1):  # its first two steps are plain
        compression.bill()
        arrived = sent(compression, parameters, gradients(rank, 0))
    return arrived, compression.bill()


def for_each(rank, task, kinds, *args):
    """What a task returns for each kind, in one start of the ranks."""
    return {kind: task(rank, kind, *args) for kind in kinds}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_mean_arrives_everywhere_with_the_bits_of_its_format(size):
    """Each rounding to p bits costs about 6.02 p + 7 dB; here is one on each rank and one or more of the sum."""
    found = ranks.run(size, for_each, one_step, KINDS)
    exact = mean_of(size)
    between = {"none": (130, 160), "bf16": (48, 56), "fp16": (64, 76), "fp8": (28, 34), "powersgd": (0, 20)}
    for kind, (floor, ceiling) in between.items():
        arrived, bill = found[0][kind]
        assert all(torch.equal(joined(arrived), joined(other[kind][0])) for other in found[1:]), kind
        measured = sqnr(joined(exact), joined(arrived))
        assert floor < measured < ceiling, kind
        assert "comm/sqnr_db" not in bill if kind == "none" else abs(bill["comm/sqnr_db"] - measured) < 0.01, kind
    small = found[0]["fp8"][0]["second"][1024:]
    assert sqnr(exact["second"][1024:], small) > 28  # 10^6 times smaller than the layer before; in blocks of its own
    arrived, _ = found[0]["powersgd"]
    assert torch.linalg.matrix_rank(arrived["first"].view(SHAPES["first"])) == 2
    assert sqnr(exact["bias"], arrived["bias"]) > 130  # vectors are sent whole


def repeated(rank, kind, steps, feedback):
    """The same gradients ``steps`` times: the sum of what arrived after each, FP64, and this rank's residuals."""
    compression, parameters = made(kind)
    for _ in range(2 if kind == "powersgd" else 0):
        sent(compression, parameters, gradients(rank, 0))
    total, sums = torch.zeros(()).double(), []
    for _ in range(steps):
        total = total + joined(sent(compression, parameters, gradients(rank, 0))).double()
        sums.append(total)
        if not feedback:
            residuals = compression.state_dict()["residuals"]
            compression.load_state_dict({"residuals": {name: torch.zeros_like(r) for name, r in residuals.items()}})
    return sums, joined(compression.state_dict()["residuals"])


def errors_after(size, kind, steps, feedback=True):
    """Norm of (sum of sent - steps * mean), relative to the mean, after each step; what residuals do not explain."""
    found = ranks.run(size, repeated, kind, steps, feedback)
    exact = joined(mean_of(size))
    sums = found[0][0]
    off = [((total - (step + 1) * exact).norm() / exact.norm()).item() for step, total in enumerate(sums)]
    owed = sum(residual.double() for _, residual in found) / size
    return off, (sums[-1] + owed - steps * exact).norm() / exact.norm()


@pytest.mark.parametrize("size", [2, 3])
def test_with_feedback_everything_arrives_in_the_end(size):
    """The sum of 32 means is off by no more than two steps' errors, where without feedback it is off by 32."""
    off, unpaid = errors_after(size, "fp8", 32)
    assert max(off) < 2 * off[0]
    assert unpaid < 32 * 2**-23  # what did not arrive is exactly what the residuals hold
    forgetful, _ = errors_after(size, "fp8", 32, feedback=False)
    assert forgetful[-1] == pytest.approx(32 * forgetful[0], rel=1e-3)


def test_powersgd_sends_in_the_end_what_two_ranks_of_a_matrix_cannot_hold():
    off, unpaid = errors_after(2, "powersgd", 128)
    assert off[-1] < 1.5 * max(off[:64])
    assert off[-1] < 128 / 4
    assert unpaid < 1e-4
    forgetful, _ = errors_after(2, "powersgd", 128, feedback=False)
    assert forgetful[-1] > 3 * off[-1]


def with_a_bad_step(rank, kind, value):
    """Steps 0 to 4, before the last one more that holds ``value`` in one place on the last rank (None: without)."""
    compression, parameters = made(kind)
    for step in range(4):
        sent(compression, parameters, gradients(rank, step))
    bad = None
    if value is not None:
        poisoned = gradients(rank, 99)
        if rank == dist.get_world_size() - 1:
            poisoned["second"][3, 5] = value
        bad = sent(compression, parameters, poisoned)["second"].view(SHAPES["second"])[3, 5]
    arrived = sent(compression, parameters, gradients(rank, 4))
    return bad, joined(arrived), compression.state_dict()["residuals"]


def test_an_inf_of_one_rank_arrives_on_all_and_leaves_nothing_behind():
    fine = ranks.run(3, for_each, with_a_bad_step, KINDS, None)
    for value in (math.inf, math.nan):
        for found, expected in zip(ranks.run(3, for_each, with_a_bad_step, KINDS, value), fine, strict=True):
            for kind, (bad, arrived, residuals) in found.items():
                _, wanted, before = expected[kind]
                assert not bad.isfinite(), kind
                assert torch.equal(arrived, wanted), kind
                assert all(torch.equal(residuals[name], before[name]) for name in before), kind


def test_fp16_overflow_is_seen():
    for found in ranks.run(2, for_each, with_a_bad_step, ("fp16", "bf16"), 1e6):
        assert found["fp16"][0] == math.inf
        assert found["bf16"][0].isfinite()


def counted(rank, kind):
    """(bill, bytes that the collectives' own tensors come to) of two steps; bytes of the uncompressed gradients."""
    compression, parameters = made(kind)
    for step in range(2):
        sent(compression, parameters, gradients(rank, step))
    compression.bill()
    size, total = dist.get_world_size(), 0.0
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    reduce, exchange, gather = dist.all_reduce, dist.all_to_all_single, getattr(dist, gather_name)

    def counting_reduce(tensor, *args, **kwargs):
        nonlocal total
        total += 2 * (size - 1) / size * tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def counting_exchange(out, tensor, *args, **kwargs):
        nonlocal total
        total += (size - 1) / size * tensor.nbytes
        return exchange(out, tensor, *args, **kwargs)

    def counting_gather(out, tensor, *args, **kwargs):
        nonlocal total
        total += (size - 1) / size * out.nbytes
        return gather(out, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_to_all_single = counting_reduce, counting_exchange
    setattr(dist, gather_name, counting_gather)
    for step in range(2):
        sent(compression, parameters, gradients(rank, step))
    dist.all_reduce, dist.all_to_all_single = reduce, exchange
    setattr(dist, gather_name, gather)
    return compression.bill(), total / 2, 2 * (size - 1) / size * sum(4 * p.numel() for p in parameters.values())


@pytest.mark.parametrize("size", [2, 3])
def test_the_bill_is_what_was_handed_to_the_collectives(size):
    fractions = {"none": 1.0, "bf16": 0.5, "fp16": 0.5, "fp8": 0.25, "powersgd": 576 / 7931}
    for found in ranks.run(size, for_each, counted, KINDS):
        for kind, (bill, total, uncompressed) in found.items():
            assert bill["comm/bytes_per_step"] == pytest.approx(total, rel=1e-12)
            assert bill["comm/bytes_frac"] == pytest.approx(total / uncompressed, rel=1e-12)
            assert bill["comm/bytes_frac"] == pytest.approx(fractions[kind], rel=0.02)


def rebuilt(rank, kind, loaded):
    """Four steps in one bucket, then two in others: the sum of what arrived, by name, and the residuals.

    ``loaded``: the last two are sent by another object with the state of the first.
    """
    compression, parameters = made(kind)
    totals = {name: torch.zeros(p.numel()).double() for name, p in parameters.items()}
    for step in range(6):
        grads = gradients(rank, step)
        if step == 4 and loaded:
            state = compression.state_dict()
            compression, parameters = made(kind)
            compression.load_state_dict(state)
        layouts = [list(SHAPES)] if step < 4 else [["second", "first"], ["scale", "bias"]]
        for index, names in enumerate(layouts):
            bucket = Bucket([(parameters[name], grads[name]) for name in names], index, index == len(layouts) - 1)
            result = compression.send(bucket).wait()
            for name, part in zip(names, result.split([parameters[name].numel() for name in names]), strict=True):
                totals[name] += part.double()
    return totals, compression.state_dict()["residuals"]


@pytest.mark.parametrize("kind", FEEDBACK)
def test_residuals_follow_their_parameters_into_other_buckets(kind):
    found = ranks.run(2, rebuilt, kind, False)
    for name in SHAPES:
        exact = sum(mean_of(2, step)[name] for step in range(6))
        owed = sum(residuals[name].double() for _, residuals in found) / 2
        arrived = found[0][0][name]
        assert (arrived + owed - exact).norm() < 1e-6 * exact.norm()
        if kind == "fp8" or "bias" != name != "scale":
            assert (arrived - exact).norm() > 1e-4 * exact.norm()  # something was owed
    for (totals, residuals), (again, others) in zip(found, ranks.run(2, rebuilt, kind, True), strict=True):
        assert all(torch.equal(totals[name], again[name]) for name in SHAPES)  # PowerSGD made new factors at random
        assert all(torch.equal(residuals[name], others[name]) for name in SHAPES)


def beside_torch(rank):
    """Six steps of ours and of torch's own hook."""
    compression, parameters = made("powersgd")
    state = PowerSGDState(None, 2, 2, orthogonalization_epsilon=1e-16)
    for step in range(6):
        grads = gradients(rank, step)
        bucket = Bucket([(parameters[name], grads[name]) for name in SHAPES])
        wanted = powerSGD_hook(state, bucket).wait().clone()
        assert torch.equal(joined(sent(compression, parameters, grads)), wanted)
    return True


def test_powersgd_is_torchs():
    assert ranks.run(2, beside_torch) == [True, True]


def after_silence(rank):
    """PowerSGD, when a matrix had no gradient at all for three compressed steps: what arrives, what was sent."""
    compression, parameters = made("powersgd")
    silent = gradients(rank, 0)
    silent["first"].zero_()
    for _ in range(5):
        assert not sent(compression, parameters, silent)["first"].any()
    generator = torch.Generator().manual_seed(rank)
    silent["first"] = torch.randn(61, 1, generator=generator) @ torch.randn(1, 83, generator=generator)
    return sent(compression, parameters, silent)["first"], silent["first"].flatten()


def test_powersgd_wakes_up_after_a_gradient_of_zeros():
    (arrived, first), (_, second) = ranks.run(2, after_silence)
    assert sqnr((first.double() + second.double()) / 2, arrived) > 60  # the mean has rank 2: all of it fits


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"dist\.compress=int8: choose one of none, bf16, fp16, fp8, powersgd"):
        Compression("int8", ALONE, {})
    with pytest.raises(ValueError, match=r"dist\.compress=powersgd: .*gain"):
        Compression("powersgd", ALONE, {nn.Parameter(torch.tensor(1.0)): "gain"})


def test_one_rank_has_nothing_to_pay():
    assert Compression("fp8", ALONE, {}).bill() == {}
