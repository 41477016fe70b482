"""A step of a small GPT, audited."""

from collections import defaultdict
from dataclasses import replace

import torch

from mptrain import Precision
from mptrain.models import gpt
from mptrain.precision.policy import PrecisionPolicy, Scaling
from mptrain.telemetry.audit import StepAudit

E, LAYERS, B, T, VOCAB = 32, 2, 2, 16, 32  # as many tokens as outputs of a layer: the shapes alone say nothing
SIZES = gpt.Config(vocab_size=VOCAB, block_size=T, n_layer=LAYERS, n_head=2, n_embd=E)
LINEAR = {"attention.qkv": (3 * E, E), "attention.out": (E, E), "mlp.up": (4 * E, E), "mlp.down": (E, 4 * E)}


def policy_of(name, backend="auto", scaling=None, **other):
    policy = replace(PrecisionPolicy.named(name), backend=backend, **other)
    if scaling is None:
        return policy
    return replace(policy, quantization=replace(policy.quantization, scaling=Scaling[scaling]))


class Step:
    """A GPT (or another model) in a precision and its training steps on random tokens."""

    def __init__(self, policy, *, checkpointing=False, accumulate=1, config=SIZES, module=gpt):
        torch.manual_seed(0)
        self.model = module.build(config)
        self.precision = Precision(policy).prepare(self.model)
        self.accumulate = accumulate
        self.vocabulary = config.vocab_size
        if checkpointing:
            self.model.recompute = self.precision.recompute

    def run(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(self.accumulate):
            tokens = torch.randint(self.vocabulary, (B, T), generator=generator)
            with self.precision.forward():
                loss = self.model(tokens, tokens.roll(1)) / self.accumulate
            self.precision.backward(loss)
            losses.append(loss.detach())
        return losses

    def audited(self, **settings):
        with StepAudit(self.model, self.precision, **settings) as step:
            self.losses = self.run()
        return step.result


HEALTHY = {
    "fp32": policy_of("fp32"),
    "tf32": policy_of("tf32"),
    "bf16": policy_of("bf16"),
    "fp16": policy_of("fp16"),
    "fp8": policy_of("fp8"),
    "fp8-delayed": policy_of("fp8-delayed"),
    "fp8-rowwise": policy_of("fp8-rowwise"),
    "fp8-tied-head": policy_of("fp8", keep_default=""),
    "fp8-native": policy_of("fp8", "native"),
    "fp8-native-rowwise": policy_of("fp8", "native", "rowwise"),
}


def wanted_flops(policy, own_linear, *, checkpointing, accumulate):
    """(kind of layer, GEMM, stage) -> FLOPs, by hand: 2 M N K for each product."""
    rows = B * T
    wanted = {("head", gemm, stage): 2 * rows * VOCAB * E * accumulate for gemm, stage in THREE}
    for name, (n, k) in LINEAR.items():
        for gemm, stage in THREE:
            wanted[f"blocks.*.{name}", gemm, stage] = 2 * rows * n * k * LAYERS * accumulate
        # Torch's own linear keeps its operands before it multiplies: recomputation ends at a block's last one.
        if checkpointing and not (own_linear and name == "mlp.down"):
            wanted[f"blocks.*.{name}", "output", "recompute"] = 2 * rows * n * k * LAYERS * accumulate
    product = 2 * B * T * T * E * LAYERS * accumulate  # of all heads, not halved for causality
    attention = "blocks.*.attention", "attention"
    wanted |= {(*attention, "forward"): 2 * product, (*attention, "backward"): 5 * product}
    if checkpointing:
        wanted[(*attention, "recompute")] = 2 * product
    return wanted


THREE = (("output", "forward"), ("grad_input", "backward"), ("grad_weight", "backward"))


def flops_by_kind(audit):
    found = defaultdict(int)
    for row in audit.rows:
        found[row.layer.replace(".0.", ".*.").replace(".1.", ".*."), row.gemm, row.stage] += row.flops
    return found
