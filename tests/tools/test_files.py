"""Files that appear whole, and JSON that is read in whatever state it is in."""

import json
import math
import threading

import pytest

from mptrain.tools import files


def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def interrupted():
        with files.whole(path) as file:
            file.write(b"half of the n")
            file.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_they_may_read_of_any_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    files.write_whole(tmp_path / "whole", "x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_readers_and_several_writers_of_one_file_see_it_whole(tmp_path):
    path, texts = tmp_path / "a", [letter * 200_000 for letter in "xyz"]
    files.write_whole(path, texts[0])
    errors = []

    def write(text):
        try:
            for _ in range(10):
                files.write_whole(path, text)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_every_parser_reads_and_number_reads_back():
    values = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": "text", "e": True, "f": None}

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(files.json_text(values), parse_constant=refuse)
    assert found == {"a": [1.5, None, ["inf", "-inf"]], "b": {"c": None}, "d": "text", "e": True, "f": None}
    assert [files.number(value) for value in (found["a"][0], *found["a"][2], 3)] == [1.5, math.inf, -math.inf, 3.0]
    assert all(math.isnan(files.number(value)) for value in (None, True, "text", [1.0], {}))


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"[1]", b"3", b"\xff\xfe\x00"])
def test_what_is_no_object_reads_as_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert files.object_in(tmp_path / "a.json") == {}


def test_torn_rows_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert list(files.rows_in(path)) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2\n\n[3]\n\xff\n{"a": 4}\n{"a": 5}\n{"a"')
    assert [row["a"] for row in files.rows_in(path)] == [1, 4, 5]


@pytest.mark.parametrize("last_bytes", range(1, 40))
def test_the_last_rows_are_those_that_are_whole_in_the_last_bytes(tmp_path, last_bytes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"a": number}) + "\n" for number in range(4)))  # 9 bytes each, 36 in all
    whole = 4 if last_bytes >= 36 else (last_bytes - 1) // 9
    assert [row["a"] for row in files.rows_in(path, last_bytes)] == list(range(4))[4 - whole :]
