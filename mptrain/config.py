"""The settings of a run: closed groups as dataclasses, open ones (model, data) by the Config of their kind.

Registered with Hydra as a schema, so a typo or a wrong type fails while the configuration is composed. OmegaConf
marks frozen dataclasses read-only; the flag is cleared on the schema, which overrides must be able to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mptrain.distributed.layout import DistConfig
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy, conf_dir
from mptrain.telemetry.drill import DebugConfig
from mptrain.telemetry.monitor import TelemetryConfig
from mptrain.tools import registry
from mptrain.tools.settings import did_you_mean, from_plain, require, to_plain
from mptrain.training.config import TrainerConfig

LARGEST_SEED = 2**63 - 1  # what torch's generators take


@dataclass(frozen=True)
class LoggerConfig:
    """``wandb``: also log to Weights & Biases, online when logged in, offline when not. ``group``: a sweep's is its
    folder's name. ``also``: further files of mptrain/loggers, separated by spaces."""

    wandb: bool = True
    project: str = "mptrain"
    group: str = ""
    also: str = ""

    def __post_init__(self) -> None:
        known = registry.kinds("mptrain.loggers")
        for name in self.also.split():
            if name not in known:
                raise ValueError(f"logger.also={name} is not in mptrain/loggers{did_you_mean(name, known)}")
            if name == "wandb" and not self.wandb:
                raise ValueError("logger.also=wandb does not open W&B: set logger.wandb=true")


@dataclass(frozen=True)
class AuditConfig:
    """``min_coverage``: stop after the first step if a smaller share of its GEMM FLOPs ran in what precision asks."""

    min_coverage: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.min_coverage <= 1, "audit.min_coverage", self.min_coverage, "from 0 to 1, e.g. 0.8")


@dataclass(frozen=True)
class CheckpointConfig:
    """``every``: steps between checkpoints, 0 for only at the end; ``keep``: how many stay on disk; ``background``:
    training continues while a copy of its state is written."""

    every: int = 0
    keep: int = 2
    background: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made of. ``deterministic``: torch's deterministic algorithms alone, so that a GPU repeats a
    run bit for bit as a CPU does; an operation that has none is an error."""

    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    seed: int = 0
    device: str = "auto"
    deterministic: bool = False
    run_dir: str = ""
    runs_dir: str = "runs"
    sweep_dir: str = ""
    sweep_seeds: int = 0
    resume: str = "none"
    resume_anyway: bool = False
    baseline: str = "auto"

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        require(0 <= self.seed <= LARGEST_SEED, "seed", self.seed, f"from 0 to {LARGEST_SEED}")
        if self.trainer.on_spike == "rollback" and not self.checkpoint.every:
            raise ValueError("trainer.on_spike=rollback needs checkpoints to go back to: set checkpoint.every=50")


def register() -> None:
    """Make the schema known to Hydra (config.yaml names it first in its defaults list)."""
    schema = OmegaConf.structured(RunConfig)
    _thaw(schema)
    for group in ("model", "data"):
        OmegaConf.set_struct(schema[group], False)  # open: checked against the Config of their kind
    ConfigStore.instance().store("schema", schema)


def composed(overrides: list[str]) -> RunConfig:
    """The settings that ``python train.py`` would run with these overrides. Errors as there: see :func:`explain`."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base=None):
        return parse(compose("config", overrides))


def _thaw(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _thaw(child)


def parse(composed: DictConfig) -> RunConfig:
    """Turn what Hydra composed into validated dataclasses. ValueError (or OmegaConf's own) for what cannot work."""
    _refuse_added(OmegaConf.to_container(composed), to_plain(RunConfig()))
    config: RunConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
    check_open(config)
    return config


def check_open(config: RunConfig) -> None:
    """ValueError for what the Config of a model's or a data's kind does not know."""
    for package, group, values in (("mptrain.models", "model", config.model), ("mptrain.data", "data", config.data)):
        parse_open(package, group, values)


def plain(composed: DictConfig) -> dict[str, Any]:
    """Turn what Hydra composed into nested plain values. ValueError for keys that the schema does not have."""
    values: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    _refuse_added(values, to_plain(RunConfig()))
    return values  # type: ignore[no-any-return]


def typed_paths(overrides: list[str]) -> list[tuple[str, bool]]:
    """List of each override its dotted setting (of ``precision=fp8`` the whole group) and whether it deletes."""
    overrides_read = OverridesParser.create().parse_overrides(overrides)
    return [(one.key_or_group.replace("/", "."), one.is_delete()) for one in overrides_read if one.package is None]


def readable(words: list[str]) -> list[str]:
    """Command-line words as Hydra's grammar reads them: a value that it cannot read is quoted, ``~`` is the home."""
    parser = OverridesParser.create()
    quoted_words = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[+~]{0,2}[\w./@-]+", key) and not _reads(parser, word):
            value = str(Path(value).expanduser()) if value.startswith("~") else value
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            quoted = f'{key}="{escaped}"'
            word = quoted if _reads(parser, quoted) else word
        quoted_words.append(word)
    return quoted_words


def _reads(parser: OverridesParser, word: str) -> bool:
    try:
        parser.parse_override(word)
    except HydraException:
        return False
    return True


def _refuse_added(values: Any, known: Any, where: str = "") -> None:
    """ValueError for keys that ``+key=value`` put beside the schema's; an empty mapping there is an open group."""
    if not isinstance(values, dict) or not known:
        return
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown setting {where}{key}{did_you_mean(str(key), sorted(known))}")
        _refuse_added(value, known[key], f"{where}{key}.")


def parse_open(package: str, group: str, values: dict[str, Any], **filled: Any) -> tuple[Any, Any]:
    """The module and the Config of an open group.

    ``filled`` replaces those of the Config's settings that are left at 0 (sizes from the data); others are ignored.
    """
    settings = dict(values)
    kind = str(settings.pop("kind", ""))
    module = registry.load(package, kind)
    known = {field.name for field in fields(module.Config)}
    for key, value in filled.items():
        if key in known and not settings.get(key):
            settings[key] = value
    return module, from_plain(module.Config, settings, group)
