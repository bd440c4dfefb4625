"""lm-evaluation-harness on sub-networks: mlx-lm's ``MLXLM``, which selects for each question.

This module needs the package ``lm_eval``.
"""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from mlx_lm.evaluate import DEFAULT_MAX_TOKENS, MLXLM, _lstrip, _rstrip_until

from ..generation.request import Request
from ..generation.stream import Answer
from ..model import IFPModel
from ..selection.selection import Selection, digest_of
from .losses import Run
from .scoring import read_prompt
from .ways import Selections

# The task of a request, and its question without the shots that stand before it.
Question = Callable[[Instance], tuple[str, str]]


class IFPLM(MLXLM):
    """A checkpoint as lm-evaluation-harness sees it, under one way to select.

    Requests are grouped by what their questions select, and each group runs as ``MLXLM`` runs
    requests. Where the whole model reads prompts, it does so here, and answers are generated one by
    one, because mlx-lm's batches read their prompts themselves.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        run (Run): what selects, and how much is kept.
        selections (Selections): finds it.
        question (Callable): gives a request's task and question.
        dense_prefill (bool): whether the whole model reads prompts.
        max_tokens (int): of an answer; None for what the task says.
        batch_size (int): sequences at once.
        use_chat_template (bool): None: if the model has one.
        sampler (Callable): mlx-lm's; None is greedy.
    """

    def __init__(
        self,
        model: IFPModel,
        run: Run,
        selections: Selections,
        question: Question,
        *,
        dense_prefill: bool,
        max_tokens: int | None = None,
        batch_size: int = 8,
        use_chat_template: bool | None = None,
        sampler: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        # MLXLM's own would load a model.
        LM.__init__(self)
        self.tokenizer = model.tokenizer
        self.use_chat_template = (
            model.tokenizer.chat_template is not None
            if use_chat_template is None
            else use_chat_template
        )
        self._max_tokens, self._batch_size, self._sampler = max_tokens, batch_size, sampler
        self._ifp, self._run, self._selections = model, run, selections
        self._question = question
        self._dense_prefill = dense_prefill and run.way.by != "dense"
        self._selection: Selection | None = None
        self.groups = 0

    def _grouped(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], list[Instance]]]:
        """Requests of one selection together, with their places; its network is in memory."""
        groups: dict[str, list[int]] = defaultdict(list)
        found: dict[str, Selection | None] = {}
        for place, request in enumerate(requests):
            task, question = self._question(request)
            messages = [{"role": "user", "content": question}]
            selection = self._selections.find(self._run.way, self._run.keep, messages, task)
            groups[digest_of(selection)].append(place)
            found[digest_of(selection)] = selection
        for digest, places in groups.items():
            self._selection = found[digest]
            ready = self._ifp.prepare(selection=found[digest], dense=found[digest] is None)
            with self._ifp.using(ready) as network:
                self._model = network
                yield places, [requests[place] for place in places]
            self.groups += 1

    def _in_groups(
        self, name: str, requests: Sequence[Instance], run: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        results: list[Any] = [None] * len(requests)
        for places, group in self._grouped(requests):
            for place, result in zip(places, run(group), strict=True):
                results[place] = result
                # What is finished is kept, so that a run that is killed goes on after it.
                self.cache_hook.add_partial(name, requests[place].args, result)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """As MLXLM's, each request under the selection of its question."""
        return self._in_groups("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """As MLXLM's. A text that has no prompt is read by the sub-network alone."""
        return self._in_groups("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """As MLXLM's, each request under the selection of its question."""
        run = self._generate_one_by_one if self._dense_prefill else super().generate_until
        # mlx-lm says how far it is, which is no result.
        with contextlib.redirect_stdout(sys.stderr):
            return self._in_groups("generate_until", requests, run)

    def _process_prompt(self, prompt: Sequence[int], step_size: int = 2048) -> tuple[mx.array, Any]:
        if not self._dense_prefill:
            return super()._process_prompt(prompt, step_size)
        ready = self._ifp.prepare(dense=True)
        with self._ifp.using(ready) as dense:
            read = read_prompt(dense, list(prompt), step_size)
        return nn.log_softmax(read.logits.astype(mx.float32)), read.cache

    def _generate_one_by_one(self, requests: list[Instance]) -> list[str]:
        texts = []
        for request in requests:
            context, options = request.args
            tokens = self.tokenizer.encode(context, add_special_tokens=not self.use_chat_template)
            most = self._max_tokens or options.get("max_gen_toks", DEFAULT_MAX_TOKENS)
            asked = Request(
                tokens,
                selection=self._selection,
                prefill="dense",
                options={"max_tokens": most, "sampler": self._sampler},
            )
            until, text = options["until"], ""
            for response in Answer(self._ifp, self.tokenizer, asked):
                text += response.text
                # What comes after it would be cut anyway.
                if any(stop in text for stop in until):
                    break
            text = _rstrip_until(text, until)
            if self.tokenizer.has_thinking:
                text = _lstrip(text, self.tokenizer.think_end)
            texts.append(text)
        return texts


def questions_of(tasks: Mapping[str, Any]) -> Question:
    """How to find the task and the question of a request.

    A task whose prompts are more than one question with shots before it has no such text; then
    everything that the model reads selects.

    Args:
        tasks: lm-evaluation-harness's tasks by their names.
    """

    def question(request: Instance) -> tuple[str, str]:
        name = str(request.task_name)
        text = tasks[name].doc_to_text(request.doc) if name in tasks else None
        if not isinstance(text, str) or not text.strip():
            text = str(request.args[0])
        return name, text

    return question
