"""SIGINT and SIGTERM (Ctrl-C, a job that is taken off its machine) end training after the step under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """``stopped_by``: the signal that asked to stop, None while nothing did."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """The first signal is noted; a second SIGINT interrupts at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = signal.Signals(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
