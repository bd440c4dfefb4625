"""Ways to select: which text or which scores say what is kept for a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..choices import WAYS
from ..dense_pass.layers import DensePass, Measure
from ..dense_pass.prefill import read_text
from ..errors import IFPError
from ..llm.messages import Message
from ..lru import LRU
from ..model import IFPModel
from ..selection.keep import Keep
from ..selection.selection import Selection
from ..selectors.text import selecting_text

# Passes of the dense LLM over texts.
_REMEMBERED_PASSES = 4


@dataclass(frozen=True)
class Way:
    """A way to select.

    Attributes:
        by: ``prompt``: each prompt selects; ``task``: a description of its task does; ``static``:
            the checkpoint's stored scores; ``dense``: nothing is left out; ``named``: a saved task.
        selector: what scores the channels for a text; None for the default.
        name: the saved task's.
    """

    by: str
    selector: str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Read ``prompt``, or ``task:SELECTOR``, and so on.

        Raises:
            ValueError: if there is no such way.
        """
        by, _, selector = text.partition(":")
        if by not in WAYS or (selector and by not in ("prompt", "task")):
            raise ValueError(text)
        return cls(by, selector or None)

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.by == "named":
            return f"task {self.name}"
        return self.by if self.selector is None else f"{self.by}:{self.selector}"

    def check(self, model: IFPModel) -> None:
        """Raises IFPError if the model has no such selector or saved task."""
        if self.by == "static":
            model.checkpoint.checked_selector("static")
        elif self.selector is not None:
            model.checkpoint.checked_selector(self.selector)
        elif self.name is not None:
            model.tasks.load(self.name)


class Selects(Protocol):
    """What finds the selection for a prompt: see :meth:`Selections.find`."""

    def find(
        self, way: Way, keep: Keep | None, messages: list[Message], task: str
    ) -> Selection | None:
        """The selection; None is the dense model."""


class Selections:
    """What each way selects for each text; nothing is computed twice.

    Args:
        model (IFPModel): what selects.
        texts: descriptions of tasks, by the names of the tasks. Those that are missing are taken
            from the saved task of the name.
        task: one description for all.
    """

    def __init__(
        self, model: IFPModel, texts: Mapping[str, str] | None = None, task: str | None = None
    ) -> None:
        self._model, self._texts, self._task = model, dict(texts or {}), task
        self._made: dict[tuple[str, str, str | None, str], Selection] = {}
        self._passes: LRU[tuple[int, ...], DensePass] = LRU(_REMEMBERED_PASSES)

    def find(
        self, way: Way, keep: Keep | None, messages: list[Message], task: str
    ) -> Selection | None:
        """The selection for a prompt; None is the dense model.

        Args:
            way (Way): what selects.
            keep: channels to keep; None for the checkpoint's k, or a saved task's own. A saved task
                without scores has its own in any case.
            messages (list): the prompt.
            task (str): the name of its task.

        Raises:
            IFPError: if a text is empty or too long, or nothing is known of the task.
        """
        if way.by == "dense":
            return None
        text, selector = "", way.selector
        if way.by == "prompt":
            said = selecting_text(messages, self._model.checkpoint.ifp.text.source)
            # Messages have strings.
            text = str(said)
        elif way.by == "task":
            text = self.description(task)
        elif way.by == "static":
            # A static selection is the same for every text.
            text, selector = "static", "static"
        key = (way.by, way.name or text, selector, f"{keep}")
        if key not in self._made:
            if way.name is not None:
                self._made[key] = self._named(way.name, keep)
            else:
                self._made[key] = self._of_text(text, selector, keep)
        return self._made[key]

    def _named(self, name: str, keep: Keep | None) -> Selection:
        task = self._model.tasks.load(name)
        if keep is None or task.scores is None:
            return task.selection
        return self._model.text_selector.of_scores(mx.array(task.scores), keep)

    def _of_text(self, text: str, selector: str | None, keep: Keep | None) -> Selection:
        """The selection of a text, as the model gives it."""
        return self._model.text_selector.find(text, selector, keep, self._run_dense)[0]

    def _run_dense(self, tokens: list[int], measure: Measure | None) -> DensePass:
        """The dense LLM's pass over a text, which serves every k and every selector."""
        made, _ = self._passes.get_or_make(
            (*tokens, measure is None), lambda: (read_text(self._model.parent, tokens, measure), 1)
        )
        return made

    def description(self, task: str) -> str:
        """The text that describes a task.

        Raises:
            IFPError: if there is none.
        """
        if self._task is not None:
            return self._task
        if task not in self._texts:
            if task not in self._model.tasks.names():
                raise IFPError(
                    f"Nothing describes the task {task}: give --task TEXT, --task-texts FILE, or "
                    "save a task of that name with mlx_ifp.tasks add."
                )
            self._texts[task] = self._model.tasks.load(task).text
        return self._texts[task]
