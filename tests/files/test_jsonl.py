"""Files of JSON objects: what is read, and how what cannot be is named."""

import re

import pytest

from mlx_ifp.errors import IFPError
from mlx_ifp.files.jsonl import read_jsonl


def rows_of(path, content: bytes, **kwargs) -> list:
    path.write_bytes(content)
    return read_jsonl(path, lambda row, line: (line, row), **kwargs)


def test_rows_have_the_numbers_of_their_lines(tmp_path):
    # U+2028 ends a line for str.splitlines, but not for JSON.
    content = '{"a": 1}\n\n  \n{"b": "one\u2028line"}\r\n'.encode()
    assert rows_of(tmp_path / "x.jsonl", content) == [(1, {"a": 1}), (4, {"b": "one\u2028line"})]
    assert rows_of(tmp_path / "x.jsonl", b"") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b"{'a': 1}", "not JSON that can be read (Expecting property name"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"[1]", "must be a JSON object, not list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    with pytest.raises(IFPError, match=re.escape(f"{path}: line 2: {words}")):
        rows_of(path, b"{}\n" + line + b"\n{}\n", last_may_be_cut=True)


def test_a_last_line_may_be_cut(tmp_path):
    content = b'{"a": 1}\n{"b": "\xc3'
    assert rows_of(tmp_path / "x.jsonl", content, last_may_be_cut=True) == [(1, {"a": 1})]
    with pytest.raises(IFPError, match="line 2"):
        rows_of(tmp_path / "x.jsonl", content)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(IFPError, match=r"x.jsonl: cannot be read \(No such file"):
        read_jsonl(tmp_path / "x.jsonl", lambda row, _: row)
