"""Every YAML of conf/ and recipes/ composes into valid settings, and conf/ says the same as the dataclasses."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mptrain import config
from mptrain.config import AuditConfig, CheckpointConfig, LoggerConfig, RunConfig, TelemetryConfig
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy
from mptrain.tools.settings import to_plain
from mptrain.training.config import TrainerConfig

ROOT = Path(__file__).parent.parent
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"
FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
OPTIONS = [path for path in FILES if path.parent.name != "ablation"]  # sweeps, no settings: tests/test_sweep.py
NEEDS = {
    "hf": ["model.config=config.json"],
    "tokens": ["data.train=a.bin", "data.validation=b.bin"],
    "gpt-small-h100": ["data.train=a", "data.validation=b"],
}


def composed(*overrides, name="config", folder=CONF, search=()):
    config.register()
    with initialize_config_dir(str(folder), version_base=None):
        extra = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in search)}]"] if search else []
        return config.parse(compose(name, [*overrides, *extra]))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_shows_its_command_first(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"model_type": "gpt2"}')
    group, name = option.parent.name, option.stem
    settings = composed(f"{group}={name}", *NEEDS.get(name, []))
    assert isinstance(settings, RunConfig)
    text = (CONF / option).read_text()
    assert "train.py" in text.splitlines()[0]
    assert len(text.splitlines()) <= 20
    plain = to_plain(getattr(settings, group))
    for key, value in yaml.safe_load(text).items():
        if key != "defaults" and value != "???":
            assert _contains(plain[key], value), f"{group}.{key}"


def _contains(whole, part):
    if isinstance(part, dict):
        return all(_contains(whole[key], value) for key, value in part.items())
    return whole == part


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_composes(path):
    settings = composed(*NEEDS.get(path.stem, []), name=path.stem, folder=RECIPES, search=[CONF])
    assert f"-cn {path.stem}" in path.read_text().splitlines()[0]
    assert settings.trainer.max_steps >= 300


def test_the_default_files_hold_the_defaults_of_the_dataclasses():
    kinds = {"optim/adamw": OptimConfig, "trainer/cpu": TrainerConfig, "logger/default": LoggerConfig}
    kinds |= {"telemetry/default": TelemetryConfig, "checkpoint/default": CheckpointConfig}
    kinds |= {"audit/default": AuditConfig}
    for name, kind in kinds.items():
        values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert values == {key: value for key, value in to_plain(kind()).items() if key in values}
    assert PrecisionPolicy.named("fp32") == PrecisionPolicy(name="fp32")


def test_the_package_ships_the_same_files():
    shipped = ROOT / "mptrain" / "conf"
    assert sorted(path.relative_to(shipped) for path in shipped.glob("*/*.yaml")) == FILES
