"""Read an offline W&B run from its file, without W&B."""

import json
import time
from types import SimpleNamespace

LIMIT_S = 60


def records(content):
    """The records of a .wandb file: 7 bytes, then LevelDB's log format (32 KiB blocks of crc, size, type, data)."""
    whole, at = b"", 7
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""


def _whole(folder):
    """The parsed records up to ``exit``, the last one: W&B's own process writes the file and may be behind."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/**/*.wandb")
    began = time.monotonic()
    while True:
        parsed = [wandb_internal_pb2.Record.FromString(data) for data in records(file.read_bytes())]
        if any(record.HasField("exit") for record in parsed):
            return parsed
        assert time.monotonic() - began < LIMIT_S, f"{file} has no end"
        time.sleep(0.05)


def read(folder):
    """``logged`` (key -> values in order), ``final`` (the summary), ``alerts``, ``group`` and ``job_type``."""
    found = SimpleNamespace(logged={}, final={}, alerts=[], group="", job_type="")
    for record in _whole(folder):
        for item in record.history.item:
            found.logged.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
        if record.HasField("alert"):
            found.alerts.append(record.alert.text)
        if record.HasField("run"):
            found.group, found.job_type = record.run.run_group, record.run.job_type
        for item in record.summary.update:
            found.final["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found
