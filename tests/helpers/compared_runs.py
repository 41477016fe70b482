"""Runs with losses of a known shift, in folders."""

import numpy as np
from fake_runs import falling, settings, write

STEPS = 200


def shifted(seed, shift=0.0, noise=0.002, steps=STEPS):
    """A curve whose end differs from FP32's of the same seed by ``shift`` and a little chance."""
    jitter = np.random.default_rng((seed, 77)).standard_normal() * noise
    return falling(steps, seed=seed) + (shift + jitter) * np.linspace(0, 1, steps)


def sweep(root, shifts, seeds=range(3), steps=STEPS):
    for name, shift in shifts.items():
        for seed in seeds:
            losses = falling(steps, seed=seed) if name == "fp32" else shifted(seed, shift, steps=steps)
            write(root / f"{name},{seed}", settings(name, seed, steps=steps), losses)
    return root


def by_label(comparison):
    return {variant.label: variant for group in comparison.groups for variant in group.variants}
