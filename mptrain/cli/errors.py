"""Error messages for users: one line that names the setting to change, and exit status 2.

Nothing heavy is imported here: ``mptrain --help`` answers in a quarter of a second, torch alone takes two.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mptrain.tools.settings import did_you_mean, to_plain

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
USER_ERRORS = (  # (module, class) besides ValueError and OSError
    ("hydra.errors", "HydraException"),
    ("omegaconf.errors", "OmegaConfBaseException"),
    ("torch", "OutOfMemoryError"),
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that the user can correct into one message and exit code 2, Ctrl-C and SIGTERM into a line and 130.

    HYDRA_FULL_ERROR=1 shows the traceback instead of the message.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra prints errors in its own way and exits with 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both unwind: probes end, partial files are removed
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; saved checkpoints are complete (resume=auto run_dir=FOLDER continues)", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not _is_told(error):  # reported by rank 0
            if SHOW_TRACEBACK or not _is_the_users(error):
                raise
            _tell(error)
        raise SystemExit(2) from None
    finally:
        if not SHOW_TRACEBACK:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _is_the_users(error: BaseException) -> bool:
    """Return whether the user can correct the error; a library that is not imported cannot have raised one."""
    kinds = [ValueError, OSError]
    for module, name in USER_ERRORS:
        kinds += [getattr(sys.modules[module], name)] if module in sys.modules else []
    return isinstance(error, tuple(kinds))


def _is_told(error: BaseException) -> bool:
    distributed = sys.modules.get("mptrain.distributed")
    return distributed is not None and isinstance(error, distributed.Told)


def _tell(error: BaseException) -> None:
    """Print the message: once, where several ranks raise the same error before they join."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    group = sys.modules.get("torch.distributed")
    joined = group is not None and group.is_available() and group.is_initialized()
    if joined or rank == 0:
        who = f"rank {rank}: " if joined and size > 1 else ""
        print(f"error: {who}{explain(error)}", file=sys.stderr)


def explain(error: BaseException) -> str:
    """Return the message of an error; Hydra's and OmegaConf's are rewritten to name the setting and the nearest
    match."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: lower trainer.batch_size, or set trainer.checkpointing=true"
    if type(error).__name__ == "MissingMandatoryValue":
        key = getattr(error, "full_key", "")
        return f"{key} has no value: set {key}=..."
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _unknown_key(unknown.group(1))
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if missing:
        group, name = missing.groups()
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        return f"{group}={name} is unknown{did_you_mean(name, options)}"
    merging = re.search(r"Error merging override (\S+)", text)
    if merging and error.__cause__ is not None:
        return f"{merging.group(1)} cannot work: {str(error.__cause__).splitlines()[0]}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return text if isinstance(error, ValueError) else text.splitlines()[0]


def _unknown_key(path: str) -> str:
    """Walk the schema along a dotted path to the first part that is not there."""
    from mptrain.config import RunConfig  # already imported: the error is Hydra's

    known: Any = to_plain(RunConfig())
    walked: list[str] = []
    for part in path.split("."):
        if not isinstance(known, dict) or part not in known:
            options = sorted(known) if isinstance(known, dict) else []
            where = ".".join([*walked, part])
            return f"unknown setting {where}{did_you_mean(part, options)}"
        known = known[part]
        walked.append(part)
    return f"{path} cannot be set like this"
