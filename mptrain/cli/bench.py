"""``mptrain bench``: What a machine reaches, against targets and peers: cpu, telemetry, dist, plan, gpu, verdict"""

from __future__ import annotations

import argparse
import importlib

from mptrain.cli.arguments import command_parser
from mptrain.tools.settings import did_you_mean

SUBJECTS = {
    "cpu": "the emulation, the kernels and the trainer on this CPU",
    "telemetry": "the cost of watching a run",
    "dist": "several processes: layouts and compressed gradients",
    "plan": "planned memory against what is measured",
    "gpu": "formats, kernels and training on a GPU",
    "verdict": "how often the verdict of a comparison is right",
}


def run(argv: list[str]) -> int:
    """Measure one subject. ValueError for an unknown one."""
    if argv[:1] in (["-h"], ["--help"]):
        subjects = "\n".join(f"  {name:11}{text}" for name, text in SUBJECTS.items())
        options = {"usage": "mptrain bench SUBJECT [...]", "epilog": subjects}
        command_parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, **options).print_help()
        return 0
    if not argv:
        raise ValueError(f"mptrain bench needs a subject: {', '.join(f'bench {name}' for name in SUBJECTS)}")
    if argv[0] not in SUBJECTS:
        raise ValueError(f"mptrain bench has no subject {argv[0]!r}{did_you_mean(argv[0], [*SUBJECTS])}")
    status: int = importlib.import_module(f"mptrain.bench.{argv[0]}").run(argv[1:])
    return status
