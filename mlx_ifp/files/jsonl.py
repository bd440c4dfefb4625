"""Files of JSON objects, one a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import IFPError

T = TypeVar("T")


def read_jsonl(
    path: str | Path,
    make: Callable[[dict[str, Any], int], T],
    *,
    last_may_be_cut: bool = False,
) -> list[T]:
    """What ``make`` makes of each row; blank lines are skipped.

    Args:
        path: one JSON object a line, in UTF-8.
        make: is given a row and the number of its line; what it raises need not say where.
        last_may_be_cut (bool): leave out a last line that is no JSON: whoever wrote it was killed.

    Raises:
        IFPError: naming the file and the first line that is not usable.
    """
    made = []
    try:
        # Of bytes, so that a line that is not UTF-8 has a number.
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    if last_may_be_cut and next(lines, None) is None:
                        break
                    raise IFPError(f"{path}: line {number}: {_reason(error)}") from error
                try:
                    if not isinstance(row, dict):
                        raise IFPError(f"must be a JSON object, not {type(row).__name__}.")
                    made.append(make(row, number))
                except IFPError as error:
                    raise IFPError(f"{path}: line {number}: {error}") from error
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error
    return made


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text."
    # A JSONDecodeError counts lines of its own; its msg leaves them out.
    return f"not JSON that can be read ({getattr(error, 'msg', error)})."
