"""The tasks of a checkpoint as models: ``qwen3-ifp``, ``qwen3-ifp:python``, ``qwen3-ifp:dense``."""

import contextlib
import threading
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ...errors import IFPError
from ...llm.context import context_length
from ...model import IFPModel
from ...selection.keep import Keep
from ...selection.selection import Selection, select_channels
from ...selection.task_library import EXAMPLES, Task, check_name
from ...selectors.selector import resolved_keep
from .checks import Check, boolean, keep, read_fields, string
from .failures import Failure, bad_request

DENSE = "dense"
MAX_EXAMPLES = 256
# The dense model answers the examples that have no answer, with so many tokens at most.
ANSWER_TOKENS = 64

# Examples of a task: each has ``prompt``, and may have ``completion``.
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Choice:
    """What a model's id stands for.

    Attributes:
        id: as a client wrote it.
        task: the name of a task, or None.
        selection: the task's.
        dense: all channels are used.
    """

    id: str
    task: str | None = None
    selection: Selection | None = None
    dense: bool = False


class Models:
    """The ids of one server, and the tasks behind them. Thread-safe.

    Args:
        model (IFPModel): the checkpoint in use.
        name: the id of the base.

    Raises:
        IFPError: if the name cannot be an id.
    """

    def __init__(self, model: IFPModel, name: str) -> None:
        if not name.strip() or not name.isprintable() or len(name) > 200:
            raise IFPError("--model-name must be one line of text, not empty.")
        self.model, self.name = model, name
        self.context_length = context_length(model.checkpoint.config)
        self._created = int((model.checkpoint.path / "config.json").stat().st_mtime)
        self._lock = threading.Lock()
        # Clients that make tasks wait for one another, so that they take no more than one thread
        # from those that generate.
        self._selecting = threading.Lock()
        # Tasks that were read, with what tells whether their files have changed since.
        self._tasks: dict[str, tuple[tuple[int, int], Task]] = {}

    @property
    def ids(self) -> list[str]:
        """All ids, the base first."""
        return [self.name, *(self._id(name) for name in self.task_names()), self._id(DENSE)]

    def task_names(self) -> list[str]:
        """The tasks that have an id; one named ``dense`` has none."""
        return [name for name in self.model.tasks.names() if name != DENSE]

    def _id(self, name: str) -> str:
        return f"{self.name}:{name}"

    def task(self, name: str) -> Task:
        """A task, read from its file unless that was done before.

        Raises:
            Failure: if there is none of this name.
            IFPError: if its file is damaged.
        """
        try:
            stat = self.model.tasks.path(check_name(name)).stat()
        except (OSError, IFPError) as error:
            there = ", ".join(self.task_names()) or "none yet"
            message = f"There is no task {name[:80]!r}. The tasks are: {there}."
            raise Failure(404, message, "name", "task_not_found") from error
        stamp = (stat.st_mtime_ns, stat.st_ino)
        with self._lock:
            kept = self._tasks.get(name)
            if kept is None or kept[0] != stamp:
                kept = self._tasks[name] = (stamp, self.model.tasks.load(name))
            return kept[1]

    def find(self, id_: str | None) -> Choice:
        """What an id stands for; None is the base.

        Raises:
            Failure: if there is no such id; it lists the ids.
            IFPError: if the task's file is damaged.
        """
        if id_ is None or id_ == self.name:
            return Choice(self.name)
        if id_ == self._id(DENSE):
            return Choice(id_, dense=True)
        name = id_.removeprefix(f"{self.name}:")
        if name != id_ and name in self.model.tasks.names():
            return Choice(id_, name, self.task(name).selection)
        there = ", ".join(self.ids)
        message = f"There is no model {id_[:200]!r}. The models are: {there}."
        raise Failure(404, message, "model", "model_not_found")

    def describe(self, id_: str) -> dict[str, Any]:
        """A model in OpenAI's form."""
        created, name = self._created, id_.removeprefix(f"{self.name}:")
        if name not in (id_, DENSE):
            # The file may have been deleted a moment ago.
            with contextlib.suppress(OSError):
                created = int(self.model.tasks.path(name).stat().st_mtime)
        return {
            "id": id_,
            "object": "model",
            "created": created,
            "owned_by": "mlx_ifp",
            "context_length": self.context_length,
        }

    def list(self) -> dict[str, Any]:
        """All models in OpenAI's form."""
        return {"object": "list", "data": [self.describe(id_) for id_ in self.ids]}

    # Tasks over HTTP.

    def describe_task(self, name: str) -> dict[str, Any]:
        """A task as clients see it; one whose file is damaged says so."""
        facts: dict[str, Any] = {"object": "task", "name": name, "model": self._id(name)}
        try:
            task = self.task(name)
        except IFPError as error:
            return facts | {"error": str(error)}
        return facts | {
            "description": task.text,
            "selector": task.selector,
            "k": task.selection.k,
            "share": task.selection.share,
        }

    def list_tasks(self) -> dict[str, Any]:
        """All tasks."""
        names = self.task_names()
        return {"object": "list", "data": [self.describe_task(name) for name in names]}

    def create_task(self, body: dict[str, Any]) -> dict[str, Any]:
        """Select, and keep the selection under a name.

        Args:
            body (dict): ``name``, and ``description`` or ``examples``: prompts, or objects with
                ``prompt`` and ``completion``. They select if both are given. Also ``keep``,
                ``selector`` and ``force``.

        Raises:
            Failure: if a field is wrong, or the name is taken.
            IFPError: if the text cannot select, or the task cannot be written.
        """
        fields = read_fields(body, _TASK_FIELDS)
        name, text, examples = (fields.get(key) for key in ("name", "description", "examples"))
        if name is None:
            raise bad_request("A task needs a name.", "name")
        if text is None and examples is None:
            raise bad_request("A task is made of a description, or of examples; give one of them.")
        if check_name(name) == DENSE:
            raise bad_request(f"{DENSE!r} is the name of the whole model; take another.", "name")
        force = fields.get("force", False)
        if name in self.model.tasks.names() and not force:
            message = f"There is a task {name!r} already; delete it, or send force = true."
            raise Failure(409, message, "name", "task_exists")
        selector, kept = fields.get("selector"), fields.get("keep")
        selector = self.model.checkpoint.checked_selector(selector or self.model.selector)
        rows: Rows = examples or [{"prompt": text}]
        prompts = [row["prompt"] for row in rows]
        said = text if text is not None else "\n".join(prompts)
        with self._selecting:
            if examples is None or selector == "predictor":
                selection = _of_prompts(self.model, prompts, selector, kept)
                task = Task(name, said, selector, selection)
            else:
                task = self._by_examples(name, said, rows, kept)
        self.model.tasks.add(task, force=force)
        return self.describe_task(name)

    def _by_examples(self, name: str, said: str, rows: Rows, kept: Keep | None) -> Task:
        """A task whose channels are those that the dense model answers its examples with."""
        found = self.model.score_examples(rows, max_tokens=ANSWER_TOKENS)
        selection = self.model.select(examples=found, keep=kept)
        statistic = self.model.text_selector.scoring.statistic
        return Task(name, said, EXAMPLES, selection, found.scores, statistic)

    def delete_task(self, name: str) -> dict[str, Any]:
        """Delete a task.

        Raises:
            Failure: if there is none of this name.
        """
        if name not in self.model.tasks.names():
            self.task(name)
        self.model.tasks.remove(name)
        with self._lock:
            self._tasks.pop(name, None)
        return {"object": "task.deleted", "name": name, "deleted": True}


def _examples(name: str, value: Any) -> Rows:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_EXAMPLES:
        raise bad_request(f"{name} must be a list of 1 to {MAX_EXAMPLES} prompts.", name)
    return [_example(name, each) for each in value]


def _example(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {"prompt": string(name, value)}
    if "prompt" not in value or not value.keys() <= {"prompt", "completion"}:
        raise bad_request(f"An object in {name} must hold prompt, and may hold completion.", name)
    return {key: string(f"{name}.{key}", each) for key, each in value.items()}


_TASK_FIELDS: dict[str, Check] = {
    "name": string,
    "description": string,
    "examples": _examples,
    "keep": keep,
    "selector": string,
    "force": boolean,
}


def _of_prompts(model: IFPModel, prompts: list[str], selector: str, kept: Keep | None) -> Selection:
    """The selection of a text, or of several prompts: the channels with the largest mean score."""
    if len(prompts) == 1:
        return model.select(prompts[0], selector=selector, keep=kept)
    checkpoint = model.checkpoint
    total = mx.zeros((len(checkpoint.ffns), checkpoint.d_ffn))
    for text in prompts:
        total = total + model.scores(text, selector=selector)
        mx.eval(total)
    ks = model.text_selector.ks if kept is None else resolved_keep(checkpoint, kept)
    mask = asdict(checkpoint.ifp.mask)
    return select_channels(total / len(prompts), ks, checkpoint=checkpoint.digest, **mask)
