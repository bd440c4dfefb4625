"""Read the files of a synthesis: given prompts, descriptions of tasks, and earlier rows."""

import json
from pathlib import Path
from typing import Any

import yaml

from ..errors import IFPError
from ..files.jsonl import read_jsonl
from ..llm.messages import row_messages
from .writer import Prompt, Tasks


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read each conversation up to its first user message, and leave out repeated prompts.

    Args:
        path: JSONL in one of mlx-lm's formats; a row may have a ``task``.

    Raises:
        IFPError: naming the line that is not usable, or if there is no prompt.
    """

    def prompt_of(row: dict[str, Any], _: int) -> Prompt | None:
        messages = row_messages(row)
        roles = [message.get("role") for message in messages]
        if "user" not in roles:
            return None
        task = row.get("task")
        if not isinstance(task, str | None):
            raise IFPError("task must be a string.")
        return Prompt(messages[: roles.index("user") + 1], task or "given")

    prompts: dict[str, Prompt] = {}
    for prompt in read_jsonl(path, prompt_of):
        if prompt is not None:
            prompts.setdefault(json.dumps(prompt.messages), prompt)
    if not prompts:
        raise IFPError(f"{path} has no message of a user to answer.")
    return list(prompts.values())


def read_tasks(path: str | Path) -> Tasks:
    """Read the names of tasks, each with a description or with sentences that users say.

    Raises:
        IFPError: if the file is not YAML of this form.
    """
    try:
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IFPError(
            f"--tasks {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(tasks, dict) or not tasks or not all(map(_says, tasks.values())):
        raise IFPError(
            f"--tasks {path} must map names of tasks to a description, or to a list of sentences "
            "that users say."
        )
    return {str(name): about for name, about in tasks.items()}


def _says(about: Any) -> bool:
    sentences = about if isinstance(about, list) else [about]
    return bool(sentences) and all(isinstance(each, str) and each.strip() for each in sentences)


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that is to be continued, and remove a half-written last line.

    Raises:
        IFPError: naming the first line that is no row of a synthesis.
    """
    if not path.exists():
        return []

    def checked(row: dict[str, Any], _: int) -> dict[str, Any]:
        if len(row_messages(row)) < 2 or "messages" not in row:
            raise IFPError("this is no row of messages, a prompt and its answer; name another "
                           "--output.")  # fmt: skip
        return row

    rows = read_jsonl(path, checked, last_may_be_cut=True)
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        try:
            if content[end:].strip():
                json.loads(content[end:])
                file.write(b"\n")
        except ValueError:
            file.truncate(end)
    return rows
