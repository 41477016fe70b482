"""The comparison of a resumed run with an uninterrupted one."""

import json

from mptrain.bench.resume import _untimed

STEP = {"step": 3, "train/loss_step": 2.5, "speed/tokens_per_s": 100.0}
ALARM = {"step": 3, "event": "alarm", "reason": "flushed"}
RESUMED = {"step": 2, "event": "resumed", "reason": "checkpoint.every: 2 -> 4"}


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _untimed(path)


def test_the_clock_and_the_news_of_a_resumption_are_no_difference(tmp_path):
    """Only the killed run has the event ``resumed``: with it, no exact resumption would pass."""
    whole = rows_of(tmp_path / "whole.jsonl", STEP, ALARM)
    assert rows_of(tmp_path / "parts.jsonl", RESUMED, STEP | {"speed/tokens_per_s": 7.0}, ALARM) == whole


def test_a_loss_or_an_event_is_a_difference(tmp_path):
    whole = rows_of(tmp_path / "whole.jsonl", STEP, ALARM)
    assert rows_of(tmp_path / "parts.jsonl", RESUMED, STEP | {"train/loss_step": 2.5000002}, ALARM) != whole
    assert rows_of(tmp_path / "parts.jsonl", RESUMED, STEP) != whole
