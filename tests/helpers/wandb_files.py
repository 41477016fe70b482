"""What an offline W&B run holds, read from its file without W&B."""

import json
from types import SimpleNamespace


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


def read(folder):
    """``logged`` (key -> values in order), ``final`` (the summary), ``alerts``, ``group`` and ``job_type``."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/**/*.wandb")
    found = SimpleNamespace(logged={}, final={}, alerts=[], group="", job_type="")
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            found.logged.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
        if record.HasField("alert"):
            found.alerts.append(record.alert.text)
        if record.HasField("run"):
            found.group, found.job_type = record.run.run_group, record.run.job_type
        for item in record.summary.update:
            found.final["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found
