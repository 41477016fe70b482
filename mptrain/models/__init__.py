"""Models in plain torch, one architecture a file. A new file here is a new ``kind`` for the YAMLs of conf/model.

Such a file holds ``INPUT`` (what the model takes: ``tokens`` or ``images``, to be matched by the data's), a dataclass
``Config`` and ``build(config)``. The model's ``forward(**batch)`` is the mean loss in nats. It has ``recompute``,
``reset_parameters()``, ``flops_per_token()`` (or per image: what the data's throughput counts) and ``example(rows)``.
The file's ``sizes(settings, state)`` are the settings that the data decides, read off the weights of a trained model.
It may have ``measure(**batch)``: what validation reports beside the loss, by name, ``loss`` first.

A file whose blocks may differ from each other has ``grows_evenly(config, start, step)``: whether, after the first
``start``, each ``step`` blocks are like the ones before (a plan of memory then looks at few of them).
A file may have ``hugging_face(config, state)``: config.json and tensors of the model's twin in Hugging Face's
transformers, from the Config and the state_dict of a model; ``mptrain export`` writes them.
"""

from __future__ import annotations

from types import ModuleType

from mptrain.tools import registry


def kinds() -> list[str]:
    """Names that ``kind:`` may take in conf/model."""
    return registry.kinds(__name__)


def load(kind: str) -> ModuleType:
    """The module of one kind, with its ``Config`` and ``build``. ValueError (did you mean ...) for an unknown one."""
    return registry.load(__name__, kind)
