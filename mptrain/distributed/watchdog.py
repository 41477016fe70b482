"""A rank that dies or hangs ends the others, and is named: by torch alone they would wait, and say a socket was closed.

Each rank counts a beat every second in the store that the ranks met at, with the step it is in and what it does there.
A rank whose beat stands still is gone (killed, stopped, its machine lost). If all of them beat and none has moved for
``dist.timeout_s``, that one holds up the others which is least far.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from mptrain.distributed import Ranks

BEAT_S = 1.0
STILL_S = 3.5  # three beats missed
HUNG = 75  # exit status (EX_TEMPFAIL): torchrun may try again


class RankLost(ValueError):
    """Another rank is gone or hangs."""


class Watchdog:
    """Beats from now to :meth:`close`. ``timeout_s``: how long a rank may stay at one place."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._ranks, self._timeout_s = ranks, timeout_s
        store = dist.distributed_c10d._get_default_store()  # torch keeps no other way to the store of env://
        self._store = dist.distributed_c10d.PrefixStore("mptrain/beat", store)
        self._place: tuple[int, str] = (0, "starting")
        self._turn = 0  # places reached so far: all ranks go through the same ones
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """This rank has come here."""
        self._place, self._turn, self._since = (step, doing), self._turn + 1, time.monotonic()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * BEAT_S)

    def _watch(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_S):
            beat += 1
            try:
                self._store.set(str(self._ranks.rank), json.dumps(self._report(beat)))
            except RuntimeError:  # the store is gone with the rank (or the agent) that kept it
                return
            if time.monotonic() - self._since > self._timeout_s:
                self._give_up()

    def _report(self, beat: int) -> dict[str, Any]:
        step, doing = self._place
        who = {"host": socket.gethostname(), "pid": os.getpid()}
        return {"beat": beat, "turn": self._turn, "step": step, "doing": doing, **who}

    def _give_up(self) -> None:
        """Nothing moves here: say who holds it up, and leave, for the main thread cannot."""
        blame = self.blame(hangs=True)
        print(f"error: rank {self._ranks.rank}: {blame or 'no rank has moved'}; ending the run", file=sys.stderr)
        sys.stderr.flush()
        os._exit(HUNG)

    def blame(self, *, hangs: bool = False) -> str:
        """Name the rank that is gone; with ``hangs``, if none is, the one that is least far. Empty if unknown."""
        before = self._beats()
        time.sleep(STILL_S)
        after = self._beats()
        still = [rank for rank, beat in after.items() if before.get(rank, {}).get("beat") == beat["beat"]]
        still = [rank for rank in still if rank != self._ranks.rank]
        if still:
            return self._words(after, still, "does not answer any more")
        if not hangs or not after:
            return ""
        least = min(beat["turn"] for beat in after.values())
        slow = [rank for rank, beat in after.items() if beat["turn"] == least]
        if len(slow) == len(after):
            return ""
        return self._words(after, slow, f"has not moved for {self._timeout_s:.0f} s (dist.timeout_s)")

    def _words(self, beats: dict[int, dict[str, Any]], ranks: list[int], what: str) -> str:
        told = [f"rank {r} ({beats[r]['host']}, process {beats[r]['pid']})" for r in ranks]
        place = beats[ranks[0]]
        return f"{', '.join(told)} {what}; it was at step {place['step']}, {place['doing']}"

    def _beats(self) -> dict[int, dict[str, Any]]:
        beats = {}
        for rank in range(self._ranks.size):
            try:
                if self._store.check([str(rank)]):
                    beats[rank] = json.loads(self._store.get(str(rank)))
            except RuntimeError:  # the store is gone
                return {}
        return beats
