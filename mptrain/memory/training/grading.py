"""Every run plans its own memory before it starts and compares the plan with what it then measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mptrain.memory.training.plan import TrainingPlan
from mptrain.memory.units import GIB

REST = "activations and workspace"  # what a GPU's allocator knows only together


@dataclass(frozen=True)
class Grade:
    """Planned and measured GiB by role, on the first rank. ``off_frac``: planned over measured peak, minus 1."""

    planned_gib: dict[str, float]
    measured_gib: dict[str, float]

    @property
    def off_frac(self) -> float:
        return sum(self.planned_gib.values()) / sum(self.measured_gib.values()) - 1.0

    def by_role(self) -> dict[str, float]:
        """Planned minus measured, as a share of the measured peak."""
        whole, planned, measured = sum(self.measured_gib.values()), self.planned_gib, self.measured_gib
        return {role: (planned.get(role, 0.0) - measured.get(role, 0.0)) / whole for role in planned | measured}

    def metrics(self) -> dict[str, float]:
        """Return the metrics that a run logs."""
        figures = {"memory/planned_gib": sum(self.planned_gib.values()), "memory/plan_error_frac": self.off_frac}
        roles = {f"memory/plan_error_{role.replace(' ', '_')}_frac": share for role, share in self.by_role().items()}
        return figures | roles

    def plain(self) -> dict[str, Any]:
        """Return plain values for summary.json."""
        return {
            "roles_gib": self.planned_gib,
            **{key.partition("/")[2]: value for key, value in self.metrics().items()},
        }


def graded(plan: TrainingPlan, measured_gib: Mapping[str, float]) -> Grade | None:
    """None if nothing was measured (a run of one step)."""
    if not sum(measured_gib.values()) > 0:
        return None
    planned = {role: size / GIB for role, size in plan.roles.items()}
    if REST in measured_gib:  # the allocator tells weights and moments apart from the rest, and not when gradients came
        known = {role: planned.get(role, 0.0) for role in ("weights", "moments")}
        measured = {role: measured_gib.get(role, 0.0) for role in known}
        known[REST] = sum(planned.values()) - sum(known.values())
        measured[REST] = sum(measured_gib.values()) - sum(measured.values())
        return Grade(known, measured)
    return Grade(planned, dict(measured_gib))
