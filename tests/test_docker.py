"""docker/: what a build would trip over, found by reading (no image is built); every check finds a planted defect."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
COMPOSE = (DOCKER / "compose.yaml").read_text()
GPU = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
PREDEFINED = {"HOME", "PATH"}  # of a shell; every other variable of a RUN line is an ARG or an ENV above it


def instructions(text, tmp_path):
    """(instruction, value) of a Dockerfile, in order, comments left out."""
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    parsed = DockerfileParser(path=str(path)).structure
    return [(line["instruction"].upper(), line["value"]) for line in parsed if line["instruction"] != "COMMENT"]


def commands(value):
    """The words of each command of a RUN line."""
    lexer = shlex.shlex(value, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    found = [[]]
    for word in lexer:
        found.append([]) if set(word) <= set("&|;") else found[-1].append(word)
    return found


def ignored(path, patterns):
    """Does .dockerignore leave ``path`` (or a folder that it is in) out? The last pattern that matches decides."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    out = False
    for pattern in patterns:
        keeps, glob = pattern.startswith("!"), pattern.lstrip("!").strip("/")
        globs = [glob, glob.removeprefix("**/")]
        if any(
            fnmatchcase(one, g) and ("**" in glob or one.count("/") == g.count("/")) for one in above for g in globs
        ):
            out = not keeps
    return out


def ignore_patterns():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def copied(lines):
    for instruction, value in lines:
        if instruction in ("COPY", "ADD"):
            words = [word for word in value.split() if not word.startswith("--")]
            yield from (word.rstrip("/") for word in words[:-1])


def wrong_files(lines):
    for source in copied(lines):
        if "://" in source:
            yield f"{source} is downloaded"
        elif not (ROOT / source).exists():
            yield f"{source} does not exist"
        elif ignored(source, ignore_patterns()):
            yield f"{source} is left out by .dockerignore"


def wrong_base(lines):
    for image in (value.split()[0] for instruction, value in lines if instruction == "FROM"):
        name, _, tag = image.rpartition(":")
        if not name or not re.search(r"\d+\.\d+", tag):
            yield f"{image} is not pinned"
        python = re.match(r"\d+\.\d+(\.\d+)?", tag) if name == "python" else None
        if python and python[0] not in SpecifierSet(PROJECT["requires-python"]):
            yield f"python {python[0]} is not in {PROJECT['requires-python']}"


def wrong_runs(lines):
    for value in (value for instruction, value in lines if instruction == "RUN"):
        for words in commands(value):
            extras = set()
            if words[:2] == ["pip", "install"] and "--no-cache-dir" not in words:
                yield f"{shlex.join(words)} keeps a cache"
            if words[:2] == ["python", "docker/requirements.py"]:
                kept = words[2 : words.index(">")] if ">" in words else words[2:]
                options = {kept[n + 1] for n, word in enumerate(kept[:-1]) if word in ("--only", "--without")}
                extras |= {word for word in kept if not word.startswith("-")} - options
            for word in words:
                extras |= set(re.findall(r"\w+", (re.search(r"^\.\[(.*)\]", word) or [".", ""])[1]))
            yield from (
                f"no extra {extra} in pyproject.toml" for extra in extras - set(PROJECT["optional-dependencies"])
            )
        if "apt-get install" in value and "rm -rf /var/lib/apt/lists" not in value:
            yield "apt's lists stay in the layer"


def wrong_command(lines):
    last = dict(lines)
    if last.get("USER", "root").split(":")[0] in ("root", "0"):
        yield "runs as root"
    for instruction in ("ENTRYPOINT", "CMD"):
        if not last.get(instruction, "[]").startswith("["):
            yield f"{instruction} needs a shell"


def wrong_variables(lines):
    known = set(PREDEFINED)
    for instruction, value in lines:
        if instruction in ("ARG", "ENV"):
            known |= {word.partition("=")[0] for word in shlex.split(value)}
        elif instruction == "FROM":
            known = set(PREDEFINED)  # what is declared before FROM is not known after it
        else:
            used = re.findall(r"\$\{?([A-Za-z_]\w*)", value)
            yield from (f"{name} is not declared" for name in used if name not in known)


CHECKS = (wrong_files, wrong_base, wrong_runs, wrong_command, wrong_variables)


def defects(lines):
    return [reason for check in CHECKS for reason in check(lines)]


def test_there_are_two_dockerfiles():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.te"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_has_no_defect(path, tmp_path):
    lines = instructions(path.read_text(), tmp_path)
    assert lines[0][0] == "FROM"
    assert len(list(copied(lines))) >= 8
    assert defects(lines) == []


PLANTED = {
    "COPY conf conf/": ("COPY conv conf/", "conv does not exist"),
    "COPY recipes recipes/": ("COPY tests tests/", "tests is left out by .dockerignore"),
    "COPY README.md train.py": ("ADD https://example.org/x.py", "https://example.org/x.py is downloaded"),
    "FROM python:3.12.12-slim-bookworm": ("FROM python:latest", "python:latest is not pinned"),
    "FROM python:3.12.12": ("FROM python:3.14.0", "python 3.14.0 is not in >=3.11,<3.14"),
    "FROM python:3.12.12-slim-bookworm\n": ("FROM python\n", "python is not pinned"),
    " && pip install --no-cache-dir --requirement": (
        " && pip install --requirement",
        "pip install --requirement /tmp/rest.txt keeps a cache",
    ),
    "native sweeps": ("native sweep", "no extra sweep in pyproject.toml"),
    "--editable .": ("--editable .[te,gpu]", "no extra gpu in pyproject.toml"),
    "rm -rf /var/lib/apt/lists/*": ("true", "apt's lists stay in the layer"),
    "USER 10001": ("USER root", "runs as root"),
    'CMD ["mptrain", "doctor"]': ("CMD mptrain doctor", "CMD needs a shell"),
    'ENTRYPOINT ["tini", "--"]': ("ENTRYPOINT tini --", "ENTRYPOINT needs a shell"),
    'ARG TORCH_INDEX_URL=""': ("", "TORCH_INDEX_URL is not declared"),
}


@pytest.mark.parametrize("original", PLANTED)
def test_a_planted_defect_is_found(original, tmp_path):
    text, (defect, reason) = (DOCKER / "Dockerfile").read_text(), PLANTED[original]
    assert original in text
    assert set(defects(instructions(text.replace(original, defect), tmp_path))) == {reason}


@pytest.mark.parametrize(
    ("path", "out"),
    [("mptrain/training/trainer.py", False), ("docker/check.py", False), ("docker/compose.yaml", True),
     (".git/config", True),
     ("mptrain/kernels/__pycache__/c.pyc", True), ("tests/conftest.py", True), ("train.py", False), ("runs/a", True)],
)  # fmt: skip
def test_the_build_context_is_what_the_images_are_made_of(path, out):
    assert ignored(path, ignore_patterns()) is out


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint here")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path):
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def rendezvous(service):
    """The options of torchrun that both nodes must agree on."""
    words = " ".join(service["command"]).split()
    return dict(word.split("=", 1) for word in words if re.match("--(rdzv|nnodes)", word))


def wrong_compose(compose):
    services = compose["services"]
    nodes = {name: rendezvous(service) for name, service in services.items()}
    first = next(iter(nodes.values()))
    yield from (f"{name} meets elsewhere" for name, options in nodes.items() if options != first)
    if first.get("--nnodes") != str(len(nodes)):
        yield "nnodes is not the number of services"
    host = first["--rdzv-endpoint"].partition(":")[0]
    if host not in services:
        yield f"{host} is no service"
    for name, service in services.items():
        if not (ROOT / service["build"]["dockerfile"]).is_file():
            yield f"{name}: no {service['build']['dockerfile']}"
        if service["hostname"] != name:
            yield f"{name}: torchrun knows the endpoint's node by its host name"
        if "runs" not in compose["volumes"] or "runs:/opt/mptrain/runs" not in service["volumes"]:
            yield f"{name}: its runs are its own"
        grace = int(re.fullmatch(r"(\d+)m", service["stop_grace_period"])[1]) * 60
        if not 30 < int(service["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace:
            yield f"{name}: killed before torchrun has given up on a checkpoint"


def test_the_two_nodes_meet_and_share_their_runs():
    assert list(wrong_compose(yaml.safe_load(COMPOSE))) == []


def test_the_overrides_reach_train_py_as_words_with_their_quotes(tmp_path):
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    written = yaml.safe_load(COMPOSE)["services"]["node1"]["command"]
    command = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word).replace("$$", "$") for word in written]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OVERRIDES": "precision=fp8 precision.keep='.*[.]up|*'"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[-3:] == ["precision=fp8", "precision.keep='.*[.]up|*'", ""]
    assert "run_dir=runs/two-nodes" in done.stdout.split("\n")


PLANTED_IN_COMPOSE = {
    "docker/Dockerfile\n": ("docker/Containerfile\n", "no docker/Containerfile"),
    "endpoint=node0:": ("endpoint=node2:", "node2 is no service"),
    "hostname: node1": ("hostname: node0", "node1: torchrun knows"),
    "--nnodes=2": ("--nnodes=3", "nnodes is not"),
    "- runs:/opt": ("- ./runs:/opt", "its runs are its own"),
    "hostname: node1\n": (
        "hostname: node1\n    command: [torchrun, --rdzv-endpoint=node0:29500, --rdzv-id=b]\n",
        "node1 meets",
    ),
    "stop_grace_period: 3m": ("stop_grace_period: 1m", "killed before"),
}


@pytest.mark.parametrize("original", PLANTED_IN_COMPOSE)
def test_a_planted_defect_in_compose_is_found(original):
    defect, reason = PLANTED_IN_COMPOSE[original]
    assert original in COMPOSE
    found = list(wrong_compose(yaml.safe_load(COMPOSE.replace(original, defect))))
    assert any(reason in line for line in found)


def test_the_gpu_file_changes_both_nodes_and_gives_each_a_gpu_of_its_own():
    services = GPU["services"]
    assert set(services) == set(yaml.safe_load(COMPOSE)["services"])
    devices = [service["deploy"]["resources"]["reservations"]["devices"][0] for service in services.values()]
    ids = [one for device in devices for one in device["device_ids"]]
    assert len(ids) == len(set(ids)) == 2
    assert all("gpu" in device["capabilities"] for device in devices)
    assert all((ROOT / service["build"]["dockerfile"]).is_file() for service in services.values())


def listed(*arguments):
    command = [sys.executable, DOCKER / "requirements.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_images_install_what_pyproject_asks_for():
    optional = PROJECT["optional-dependencies"]
    alone, others = listed("--only", "torch"), listed("--without", "torch", "native", "sweeps")
    assert [Requirement(line).name for line in alone.stdout.split()] == ["torch"]
    together = set(alone.stdout.splitlines() + others.stdout.splitlines())
    assert together == {*PROJECT["dependencies"], *optional["native"], *optional["sweeps"]}
    assert any(line.startswith("torch==") for line in listed("--installed").stdout.splitlines())


@pytest.mark.parametrize(("extra", "reason"), [("gpu", "no extra 'gpu'"), ("test", "names the project itself")])
def test_an_extra_that_cannot_be_listed_is_refused(extra, reason):
    done = listed(extra)
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stdout == ""


def checked(*arguments):
    command = [sys.executable, DOCKER / "check.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_build_ends_with_the_versions_it_has(tmp_path):
    kept = tmp_path / "base.txt"
    kept.write_text(f"torch=={version('torch')}\n")
    done = checked("--kept", kept, "omegaconf")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"omegaconf {version('omegaconf')}" in done.stdout


def test_a_build_stops_at_what_is_missing_or_was_replaced(tmp_path):
    kept = tmp_path / "base.txt"
    kept.write_text("torch==2.12.0a0+1\ntransformer-engine-of-another-image==2.8\n")
    done = checked("--kept", kept, "no_such_module")
    assert done.returncode == 1
    assert "no_such_module: ModuleNotFoundError" in done.stderr
    assert f"torch was 2.12.0a0+1 in the base image and is {version('torch')} now" in done.stderr
    assert "transformer-engine-of-another-image was 2.8 in the base image and is nothing now" in done.stderr


def test_the_readme_names_what_is_there():
    text = (DOCKER / "README.md").read_text()
    bases = [
        line.split()[1] for path in DOCKERFILES for line in path.read_text().splitlines() if line.startswith("FROM")
    ]
    assert [base for base in bases if f"`{base}`" not in text] == []
    named = re.findall(r"docker/[\w.]+\w", text)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    variables = set(re.findall(r"\$\{(\w+)", COMPOSE))
    table = text[text.index("| variable |") :].partition("\n\n")[0]
    assert set(re.findall(r"`([A-Z_]+)`", table)) == variables
