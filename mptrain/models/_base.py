"""The contract of an architecture: what a file of this folder holds, and what its models can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Twin = Callable[[Any, dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]


class BaseConfig:
    """The settings that are read of any architecture. A ``Config`` has them as fields, or leaves them as here."""

    @property
    def block_size(self) -> int:
        """The tokens of a sequence, at most; 0: the model takes no sequences."""
        return 0

    @property
    def n_layer(self) -> int:
        """The number of blocks; 0: it is not a setting, and a plan of memory traces the whole model."""
        return 0

    @property
    def digest(self) -> str:
        """A hash of what the model is built from besides its settings, such as a file that they name."""
        return ""


@runtime_checkable
class Model(Protocol):
    """A model, an ``nn.Module`` besides: ``forward(**batch)`` is the mean loss in nats.

    ``measure(**batch)``, if it has one, returns what validation reports, by name, ``loss`` first.
    """

    recompute: Callable[..., Any] | None
    """Activation checkpointing, given by the caller: blocks run as ``recompute(block, x, *shared)`` in training."""

    def reset_parameters(self) -> None:
        """Draw the first weights; also what fills a meta model after ``to_empty``."""

    def flops_per_token(self) -> float:
        """Count the FLOPs of forward and backward for one token, or image: what the data's throughput counts."""
        ...

    def example(self, rows: int) -> dict[str, Tensor]:
        """Draw a random batch of about ``rows`` rows of a matrix product, as ``forward`` takes it."""
        ...


@runtime_checkable
class Architecture(Protocol):
    """A file of this folder."""

    INPUT: str
    """What the model takes, ``tokens`` or ``images``, to be matched by the data's."""
    TENSOR_PARALLEL: Mapping[str, str]
    """Pattern of layer names -> ``columns`` or ``rows``: how tensor parallelism cuts them. Empty: it cannot."""
    Config: type[Any]
    """A frozen dataclass, of :class:`BaseConfig`."""
    hugging_face: Twin | None
    """``(config, state_dict)`` -> config.json and tensors of the twin in Hugging Face's transformers, for
    ``mptrain export``; None: there is no twin."""

    def build(self, config: Any) -> nn.Module:
        """Build a freshly initialized :class:`Model` on torch's default device, from its global random state."""
        ...

    def sizes(self, settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, int]:
        """Read the settings that the data decides off the weights of a trained model."""
        ...

    def grows_evenly(self, config: Any, start: int, step: int) -> bool:
        """Tell whether, after the first ``start``, each ``step`` blocks are like the ones before: a plan of memory then
        looks at few of them."""
        ...


def all_blocks_alike(config: Any, start: int, step: int) -> bool:
    """The ``grows_evenly`` of an architecture with one kind of block."""
    del config, start, step
    return True
