"""README and recipes are true: their code runs, their commands exist, their tables are the results kept as data."""

import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mptrain import cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.partition("  #")[0] for block in blocks("sh") for line in block.splitlines()]
TRAININGS = sorted({f"train.py{line.partition('train.py')[2]}" for line in COMMANDS if "train.py" in line})


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, capsys, one_thread):
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "applied=True" in printed
    assert "2 linear layers converted" in printed


@pytest.mark.parametrize("line", TRAININGS)
def test_training_commands_compose(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("PATH").write_text('{"model_type": "gpt2"}')  # what a command names so
    words = shlex.split(line)[1:]
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        settings = config.parse(compose("config", [_first(word) for word in words if not word.startswith("-")]))
    assert settings.trainer.max_steps > 0


def _first(word):
    """One job of a sweep's command: ``precision=fp32`` of ``precision=fp32,bf16``."""
    return word.partition(",")[0]


def test_console_commands_exist():
    named = {shlex.split(line)[1] for line in COMMANDS if line.startswith("mptrain ")}
    assert named == set(cli.commands())


def test_the_first_two_commands_set_up_and_ci_runs_the_second():
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ") for command in (first, second))
    assert first.endswith("train.py precision=fp8 model=gpt-small")
    assert "^python3 -m venv .*pytest" in (ROOT / ".ci" / "run").read_text()
    assert re.match("^python3 -m venv .*pytest", second)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_links_and_files_named_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"results: (\S+)", README):
        assert (ROOT / path).exists(), path


def test_the_tables_are_made_from_the_results():
    measure = runpy.run_path(str(ROOT / "recipes" / "measure.py"))
    recipes = (ROOT / "recipes" / "README.md").read_text()
    assert measure["with_tables"](README) == README
    assert measure["with_tables"](recipes) == recipes
    changed = re.sub(r"(results: recipes/results/qat-\S+ -->\n).*\n", r"\1| another |\n", recipes)
    assert measure["with_tables"](changed) == recipes != changed


def test_every_recipe_is_in_the_recipes_readme():
    text = (ROOT / "recipes" / "README.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"-cn {path.stem}" in text
