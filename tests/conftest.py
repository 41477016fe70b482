import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Each worker of xdist, and what it starts, gets its share of the cores, before torch counts them: threads of workers
# that share cores wait for one another at the end of every operation.
SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))

import pytest  # noqa: E402
import torch  # noqa: E402
from pages import browser  # noqa: E402, F401 - a fixture


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: with more, the operations of a tiny model wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command_line(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Restore after the test the state that a command sets for its whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPTRAIN_CACHE", os.environ.get("MPTRAIN_CACHE") or str(tmp_path / "cache"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The slow tests start processes and stand together: without stealing, one worker is left with all of them."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
