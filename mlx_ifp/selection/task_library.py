"""The task library: selections that have a name, kept on disk for each checkpoint.

A task is one file of :func:`~mlx_ifp.selection.files.save_selection` with four more entries of
metadata: the task's name, the text that selected, the selector, and a digest of the whole content.
A task that examples show also has their scores, with a digest of their own.
The library is no cache: a task is only deleted by ``mlx_ifp.tasks rm``.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from ..checkpoint.directory import Checkpoint
from ..device import default_cache_dir
from ..errors import IFPError, one_line
from .files import load_selection, save_selection
from .selection import Selection, check_selection

# The selector of a task that examples show.
EXAMPLES = "examples"
_SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Task:
    """A selection with a name.

    Attributes:
        name: see :func:`check_name`.
        text: the description of the task, which selected unless examples did.
        selector: what scored the channels; :data:`EXAMPLES` if examples did.
        selection: the channels.
        scores: float32 [L, F], of the examples, so that another k can be selected; None without.
        statistic: which statistic the scores are.
    """

    name: str
    text: str
    selector: str
    selection: Selection
    scores: np.ndarray | None = None
    statistic: str = ""


def check_name(name: str) -> str:
    """The name, checked: it must be safe as a file name on every system.

    Raises:
        IFPError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise IFPError(
            f"{name!r} is no name for a task: up to 64 letters (a-z, A-Z), digits, '.', '_' and "
            "'-' are allowed, the first a letter or digit."
        )
    return name


def _content_digest(selection: Selection, metadata: dict[str, str]) -> str:
    """SHA-256 of a task's selection and of what is said about it."""
    said = json.dumps([metadata.get(name) for name in ("name", "task", "selector")])
    return hashlib.sha256(f"{selection.digest}:{said}".encode()).hexdigest()


def _scores_digest(scores: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(scores, np.float32).tobytes()).hexdigest()


def write_task(path: str | Path, task: Task, *, force: bool = False) -> None:
    """Write a task to a file, which is complete or not there at all.

    Args:
        path (str): the file.
        task (Task): what is written.
        force (bool): replace a file that exists.

    Raises:
        IFPError: if the file exists.
        OSError: if it cannot be written.
    """
    metadata = {"name": task.name, "task": task.text, "selector": task.selector}
    metadata["content"] = _content_digest(task.selection, metadata)
    if task.scores is not None:
        metadata |= {"statistic": task.statistic, "scores": _scores_digest(task.scores)}
    save_selection(path, task.selection, metadata, scores=task.scores, overwrite=force)


def read_task(path: str | Path, checkpoint: Checkpoint) -> Task:
    """Read a task's file.

    Args:
        path (str): a file of :func:`write_task`.
        checkpoint (Checkpoint): the one that the task must belong to.

    Raises:
        IFPError: if it is no such file, damaged, edited, or of another checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise IFPError(f"{path}: there is no such task file.")
    selection = load_selection(path)
    with one_line(f"{path} is damaged"), safe_open(path, "np") as file:
        metadata = file.metadata() or {}
        # Files of earlier versions have no scores.
        scores = file.get_tensor("scores") if "scores" in metadata else None
    if "content" not in metadata:
        raise IFPError(f"{path} is a selection without a name; use it with --selection.")
    if metadata["content"] != _content_digest(selection, metadata):
        raise IFPError(f"{path} was changed after it was written: its content digest is another.")
    if scores is not None and (
        metadata["scores"] != _scores_digest(scores) or scores.shape != selection.mask.shape
    ):
        raise IFPError(f"{path} was changed after it was written: its scores are others.")
    if selection.checkpoint != checkpoint.digest:
        raise IFPError(
            f"{path} was made with another checkpoint than {checkpoint.path}; "
            "its channels mean others here."
        )
    try:
        check_selection(selection, checkpoint.ffns)
    except IFPError as error:
        raise IFPError(f"{path}: {error}") from error
    return Task(
        check_name(metadata.get("name", "")),
        metadata.get("task", ""),
        metadata.get("selector", ""),
        selection,
        scores,
        metadata.get("statistic", ""),
    )


class TaskLibrary:
    """The named tasks of one checkpoint.

    They lie beside the selection cache, which never touches them. Files are read when they are
    asked for, so each process sees the tasks of all others.

    Args:
        checkpoint (Checkpoint): the one whose tasks they are.
        directory (Path): the parent of the folder ``tasks``; None for
            :func:`~mlx_ifp.device.default_cache_dir`.
    """

    def __init__(self, checkpoint: Checkpoint, directory: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._directory = directory

    @property
    def folder(self) -> Path:
        """The folder of this checkpoint's tasks."""
        root = default_cache_dir() if self._directory is None else Path(self._directory)
        return root / "tasks" / self.checkpoint.digest[:32]

    def path(self, name: str) -> Path:
        """The file of a task, whether it exists or not."""
        return self.folder / f"{check_name(name)}{_SUFFIX}"

    def names(self) -> list[str]:
        """The names of all tasks, sorted; damaged files are among them."""
        try:
            names = [path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}")]
        except OSError:
            return []
        # The names of files that are being written begin with a dot; a task's name does not.
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _existing(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            names = self.names()
            there = f"there are: {', '.join(names)}" if names else "the library is empty"
            raise IFPError(f"There is no task {name!r} for {self.checkpoint.path}; {there}.")
        return path

    def load(self, name: str) -> Task:
        """A task.

        Raises:
            IFPError: if there is none of this name, or its file is damaged, edited, or of another
                checkpoint.
        """
        return replace(read_task(self._existing(name), self.checkpoint), name=name)

    def check_new(self, name: str, *, force: bool = False) -> None:
        """Find out before the work whether :meth:`add` could store a task. This makes the folder.

        Raises:
            IFPError: if the name is bad or taken, or the folder cannot be written.
        """
        path = self.path(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IFPError(f"{self.folder} cannot be made: {error.strerror}.") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise IFPError(f"{self.folder} cannot be written: no permission.")
        if path.exists() and not force:
            raise _taken(name)

    def add(self, task: Task, *, force: bool = False) -> Path:
        """Store a task. If several processes add one name at once, only one of them succeeds.

        Args:
            task (Task): what to store, of this checkpoint.
            force (bool): replace the task of this name.

        Returns:
            Path: its file.

        Raises:
            IFPError: if the name is bad or taken, the folder cannot be written, or the selection
                is of another checkpoint.
            OSError: if it cannot be written for another reason.
        """
        if task.selection.checkpoint != self.checkpoint.digest:
            raise IFPError("The selection was made with another checkpoint.")
        check_selection(task.selection, self.checkpoint.ffns)
        self.check_new(task.name, force=force)
        path = self.path(task.name)
        try:
            write_task(path, task, force=force)
        except FileExistsError as error:
            raise _taken(task.name) from error
        return path

    def remove(self, name: str) -> None:
        """Delete a task, damaged or not.

        Raises:
            IFPError: if there is none of this name.
        """
        self._existing(name).unlink(missing_ok=True)

    def export(self, name: str, path: str | Path, *, force: bool = False) -> None:
        """Write a task to a file for another machine that holds this checkpoint.

        Raises:
            IFPError: if there is no such task, or the file exists and ``force`` is not given.
        """
        task = self.load(name)
        try:
            write_task(path, task, force=force)
        except FileExistsError as error:
            raise IFPError(f"{path} already exists; --force replaces it.") from error

    def import_file(
        self, path: str | Path, name: str | None = None, *, force: bool = False
    ) -> Task:
        """Store a task from a file of :meth:`export`, after all checks.

        Args:
            path (str): the file.
            name (str): the task's name here; None takes the one inside the file.
            force (bool): replace the task of this name.

        Raises:
            IFPError: as :func:`read_task` and :meth:`add`.
        """
        task = read_task(path, self.checkpoint)
        if name is not None:
            task = replace(task, name=name)
        self.add(task, force=force)
        return task


def _taken(name: str) -> IFPError:
    return IFPError(f"There is a task {name!r} already; --force replaces it, or name another.")
