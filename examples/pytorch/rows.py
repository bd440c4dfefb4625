"""The files of ``synthesize.py``: rows, given prompts and tasks."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from output import write_text


def fail(text: object) -> SystemExit:
    return SystemExit(f"synthesize.py: {text}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise fail(f"{path}: cannot be read ({error.strerror}).") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            messages = [m for m in row["messages"] if isinstance(m["content"], str) and m["role"]]
        except (ValueError, KeyError, TypeError) as error:
            raise fail(f'{path}, line {number}: no {{"messages": [...]}}.') from error
        rows.append(row | {"messages": messages})
    return rows


def given_prompts(path: Path, count: int | None, chance: random.Random) -> list[dict[str, Any]]:
    """Rows with what comes up to and with the first user message of each conversation."""
    prompts, seen = [], set()
    for row in read_rows(path):
        roles = [message["role"] for message in row["messages"]]
        if "user" not in roles:
            continue
        messages = row["messages"][: roles.index("user") + 1]
        key = json.dumps(messages)
        if key not in seen and messages[-1]["content"].strip():
            seen.add(key)
            prompts.append({"messages": messages, "task": row.get("task") or "given"})
    if not prompts:
        raise fail(f"{path} has no user message.")
    chance.shuffle(prompts)
    return prompts[:count]


def read_tasks(path: Path) -> dict[str, str | list[str]]:
    """name -> a description, or sentences that users say."""
    try:
        tasks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise fail(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    good = isinstance(tasks, dict) and all(
        isinstance(v, str) or (isinstance(v, list) and v and all(isinstance(s, str) for s in v))
        for v in tasks.values()
    )
    if not tasks or not good:
        raise fail(f"{path} must map names of tasks to a description or a list of sentences.")
    return {str(name): value for name, value in tasks.items()}


def existing_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an output that is to be continued; a line that was half written goes."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])
    return read_rows(path)


def split_valid(train: Path, valid: Path, count: int, chance: random.Random) -> int:
    """Move rows from one file to the other until that has ``count``; how many it has.

    Half of them are answers to given prompts, if there are as many.
    """
    rows, old = read_rows(train), existing_rows(valid)
    chosen: set[int] = set()
    places = {
        source: [i for i, row in enumerate(rows) if row.get("source") == source]
        for source in ("given", "own")
    }
    # A validation file that has given prompts already wants the model's own.
    has = Counter(row.get("source") for row in old)
    given = 0 if has["given"] else min(count // 2, len(places["given"]))
    own = max(0, min(count - len(old) - given, len(places["own"])))
    for source, number in (("given", given), ("own", own)):
        # A train file keeps at least half of its rows.
        chosen |= set(chance.sample(places[source], min(number, len(places[source]) // 2)))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if chosen:
        # First where they go: a row in both files is better than one in neither.
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in old]
        write_text(valid, "".join(kept + [lines[i] for i in sorted(chosen)]))
        write_text(train, "".join(line for i, line in enumerate(lines) if i not in chosen))
    return len(old) + len(chosen)
