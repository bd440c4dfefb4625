"""What a command can begin before it imports a library: parsed flags -> files to read ahead."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.config import CONFIG_FILE, DEFAULT_MODEL
from ..files.read_ahead import Range, read_ahead


def read_trunk_ahead(args: argparse.Namespace) -> None:
    """Let the system read the tokenizer and the trunk of a local checkpoint.

    Nothing is checked here: what is wrong with it is said by whoever opens it.
    """
    # With a limit nothing is read before it is known to fit.
    if not args.estimate_only and args.memory_limit is None:
        read_ahead(lambda: trunk_files(args.model))


def trunk_files(model: str | None) -> Iterator[Range]:
    """List the files of a checkpoint that every prompt needs whole."""
    path = DEFAULT_MODEL if model is None else Path(model).expanduser()
    yield path / "tokenizer.json", 0, 0
    for name in json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["files"]:
        # Its name is that of checkpoint.directory, which needs MLX.
        if name.startswith("model") and Path(name).name == name:
            yield path / name, 0, 0
