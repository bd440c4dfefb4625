"""Text that users wrote is read as they see it, whichever system wrote the file."""

import io

import pytest

from mlx_ifp.convert.prompts import read_prompts
from mlx_ifp.errors import IFPError
from mlx_ifp.files.jsonl import read_jsonl
from mlx_ifp.files.text import read_stdin, read_text, write_text

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "data",
    [
        "naïve 1\nline 2".encode(),
        "naïve 1\nline 2\n".encode(),
        "naïve 1\r\nline 2\r\n".encode(),
        MARK + "naïve 1\r\nline 2\r\n".encode(),
        MARK + "naïve 1\rline 2\r".encode(),
    ],
)
def test_marks_and_line_ends_are_no_part_of_a_text(tmp_path, monkeypatch, data):
    (tmp_path / "task.txt").write_bytes(data)
    assert read_text(tmp_path / "task.txt") == "naïve 1\nline 2"
    # The terminal's encoding says nothing about what is piped in.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert read_stdin() == "naïve 1\nline 2"
    (tmp_path / "prompts.txt").write_bytes(data)
    assert read_prompts(tmp_path / "prompts.txt") == ["naïve 1", "line 2"]


def test_only_one_newline_ends_a_text(tmp_path):
    (tmp_path / "task.txt").write_bytes(b" a\n\n")
    assert read_text(tmp_path / "task.txt") == " a\n"


@pytest.mark.parametrize("data", [b"\xff\xfea\x00", "naïve".encode("latin-1")])
def test_other_encodings_are_named(tmp_path, monkeypatch, data):
    (tmp_path / "task.txt").write_bytes(data)
    with pytest.raises(IFPError, match=r"task.txt is not a text file: it is not UTF-8\."):
        read_text(tmp_path / "task.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    with pytest.raises(IFPError, match="stdin is not a text file"):
        read_stdin()


def test_there_may_be_no_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert read_stdin() == ""


def test_rows_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(MARK + b'{"a": 1}\r\n\r\n{"b": "\xef\xbb\xbf"}\r\n')
    assert read_jsonl(path, lambda row, line: (line, row)) == [(1, {"a": 1}), (3, {"b": "\ufeff"})]
    path.write_bytes(MARK + b"\r\n")
    assert read_jsonl(path, lambda row, _: row) == []


def test_text_is_written_in_utf_8_in_any_locale(tmp_path):
    write_text(tmp_path / "x", "naïve\n")
    assert (tmp_path / "x").read_bytes() == "naïve\n".encode()
