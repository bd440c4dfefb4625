"""What is written next, and what is kept of what a model wrote."""

import argparse
import json
import random
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from filters import Duplicates, find_loop, why_useless
from generation import Completion, Request
from rows import read_tasks
from transformers import PreTrainedTokenizerBase
from user_turn import Template

OPENINGS = Path(__file__).with_name("openings.txt")
# Sampled prompts get odder with the temperature; without any opening there is nothing else that
# makes one differ from the next.
PROMPT_TEMPERATURE = {"free": 1.0, "openings": 0.9, "reading": 0.8, "tasks": 0.9}
# What is asked about a text. Those that end in ":" or in a word are continued by the model.
READING = (
    "Read the passage and answer the question.\n\nPassage: {text}\n\nQuestion:",
    "{text}\n\nQuestion:",
    "{text}\n\nWhat",
    "{text}\n\nWhy",
    "{text}\n\nAccording to the text,",
    "Answer the question in a few words.\n\n{text}\n\nQ:",
)
ABOUT = (
    "Summarize the following text:\n\n{text}",
    "Summarize the following text in one sentence:\n\n{text}",
    "What is the main idea of this text?\n\n{text}",
    "Give this text a title:\n\n{text}",
    "{text}\n\nList the main points of this text.",
    "Rewrite the following text in simpler words:\n\n{text}",
    "Is the following text positive or negative?\n\n{text}",
)


@dataclass
class Tag:
    """What a request is part of.

    Attributes:
        kind: how the prompt was made, or ``given``.
        task: of the row.
        opening: what the user's turn began with.
        messages: what is answered; None while the prompt is being written.
        valid: whether the row is for validation.
    """

    kind: str
    task: str
    opening: str = ""
    messages: list[dict[str, str]] | None = None
    valid: bool = False


class Synthesis:
    """Decides what is written next, and what is kept of what was written."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: argparse.Namespace,
        files: dict[bool, TextIO],
    ) -> None:
        self.args, self.files = args, files
        self.template = Template(tokenizer)
        self.chance = random.Random(args.seed)
        self.openings = OPENINGS.read_text(encoding="utf-8").splitlines()
        self.tasks = read_tasks(args.tasks) if args.tasks else {}
        self.mix = dict(args.mix)
        self.duplicates = Duplicates()
        self.accepted: list[Tag] = []
        self.answers: deque[tuple[Tag, list[int]]] = deque()
        self.given: deque[Tag] = deque()
        self.texts: deque[str] = deque(maxlen=2000)  # to ask about
        self.unfinished = 0  # prompts that are being written
        self.pending = 0  # own prompts whose answers are waited for
        self.own = 0  # rows whose prompts the model wrote
        self.rows: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.truncated = 0
        self.tried = self.kept = 0  # prompts of the model's own
        self.no_more_prompts_at = float("inf")

    def add_given(self, prompts: Iterable[dict[str, Any]], valid: bool) -> None:
        """Prompts to answer; validation comes first."""
        tags = [Tag("given", p["task"], messages=p["messages"], valid=valid) for p in prompts]
        if valid:
            self.given.extendleft(tags)
        else:
            self.given.extend(tags)

    def next_requests(self, n: int) -> list[Request]:
        """At most n requests: answers to new prompts first, then given prompts and new ones."""
        requests = []
        while self.answers and len(requests) < n:
            tag, ids = self.answers.popleft()
            requests.append(self._answer(tag, ids))
        room = n - len(requests)
        wanted = room
        if self.args.count is not None:
            wanted = self.args.count - self.own - self.unfinished - self.pending
        if time.perf_counter() > self.no_more_prompts_at or self.hopeless:
            wanted = 0
        # Neither waits for the other, however slow the device is.
        given = room if wanted <= 0 else max(room - wanted, room // 2)
        requests += self._given(min(given, room))
        requests += self._prompts(min(wanted, n - len(requests)))
        return requests

    def _answer(self, tag: Tag, ids: list[int]) -> Request:
        temperature = self.chance.choice(self.args.answer_temperature)
        return Request(ids, self.args.max_answer_tokens, temperature, tag)

    def _given(self, n: int) -> list[Request]:
        tags = [self.given.popleft() for _ in range(min(n, len(self.given)))]
        ids = self.template.encode(self.template.questions([tag.messages for tag in tags]))
        requests = []
        for tag, row in zip(tags, ids, strict=True):
            if len(row) > self.args.max_given_tokens:
                self.rejected["long given prompt"] += 1
            else:
                requests.append(self._answer(tag, row))
        return requests

    def _prompts(self, n: int) -> list[Request]:
        """n requests for new prompts; those about a text may need no writing and are answered."""
        if n <= 0 or not self.mix:
            return []
        kinds = self.chance.choices(list(self.mix), list(self.mix.values()), k=n)
        tags, earlier = [], []
        for kind in kinds:
            messages: list[dict[str, str]] = []
            if kind == "reading" and not self.texts:
                kind = "openings"
            tag = Tag(kind, "own" if kind == "free" else f"own-{kind}")
            if kind == "openings":
                tag.opening = self.chance.choice(self.openings)
            elif kind == "reading":
                text = self.texts.popleft()
                # A quarter asks what needs no question.
                forms = ABOUT if self.chance.random() < 0.25 else READING
                tag.opening = self.chance.choice(forms).format(text=text)
                if forms is ABOUT:
                    self._accept(tag, tag.opening, [])
                    continue
            elif kind == "tasks":
                tag.task, value = self.chance.choice(list(self.tasks.items()))
                if isinstance(value, str):
                    messages = [{"role": "system", "content": value}]
                else:
                    # What users said before shows what they say next.
                    seeds = self.chance.sample(value, min(3, len(value)))
                    messages = [{"role": "user", "content": seed} for seed in seeds]
            tags.append(tag)
            earlier.append(messages)
        texts = self.template.beginnings(earlier, [tag.opening for tag in tags])
        requests = []
        for tag, ids in zip(tags, self.template.encode(texts), strict=True):
            if len(ids) <= self.args.max_given_tokens:
                temperature = PROMPT_TEMPERATURE[tag.kind] * self.args.prompt_temperature
                requests.append(Request(ids, self.args.max_prompt_tokens, temperature, tag))
        self.unfinished += len(requests)
        self._encode_accepted()
        return requests

    def _accept(self, tag: Tag, text: str, tokens: list[int]) -> None:
        """Keep a prompt, to be answered, or count why not."""
        self.tried += 1
        reason = why_useless(text, tokens, self.template.special)
        if reason is None and self.duplicates.add(text):
            reason = "duplicate"
        if reason:
            self.rejected[reason] += 1
            return
        tag.messages = [{"role": "user", "content": text}]
        self.pending += 1
        self.kept += 1
        self.accepted.append(tag)

    def _encode_accepted(self) -> None:
        tags, self.accepted = self.accepted, []
        ids = self.template.encode(self.template.questions([tag.messages for tag in tags]))
        for tag, row in zip(tags, ids, strict=True):
            if len(row) > self.args.max_given_tokens:
                self.rejected["long"] += 1
                self.pending -= 1
            else:
                self.answers.append((tag, row))

    def on_complete(self, completions: list[Completion]) -> None:
        """Keep what is finished: prompts are queued for their answers, answers written."""
        texts = self.template.decode([completion.tokens for completion in completions])
        written: dict[bool, list[str]] = {True: [], False: []}
        for completion, text in zip(completions, texts, strict=True):
            tag = completion.request.tag
            if tag.messages is None:
                self.unfinished -= 1
                if completion.ended:
                    self._accept(tag, (tag.opening + text).strip(), completion.tokens)
                else:
                    self.tried += 1
                    self.rejected["long"] += 1
                continue
            if tag.kind != "given":
                self.pending -= 1
            row = self._row(completion, text)
            if row is not None:
                self.own += tag.kind != "given"
                self.rows[tag.task] += 1
                written[tag.valid].append(json.dumps(row, ensure_ascii=False) + "\n")
        for valid, lines in written.items():
            if lines:
                self.files[valid].write("".join(lines))
                self.files[valid].flush()
        self._encode_accepted()

    def _row(self, completion: Completion, text: str) -> dict[str, Any] | None:
        """The row of an answer; None if there is nothing in it."""
        tag, tokens, whole = completion.request.tag, completion.tokens, completion.ended
        cut = find_loop(tokens)
        special = next((i for i, t in enumerate(tokens) if t in self.template.special), None)
        cut = min((x for x in (cut, special) if x is not None), default=None)
        if cut is not None:
            (text,), whole = self.template.decode([tokens[:cut]]), False
        if not whole:
            text = text.rstrip("\ufffd")
        text = text.strip()
        if not text:
            self.rejected["no answer"] += 1
            return None
        answer = {"role": "assistant", "content": text}
        row = {
            "messages": [*tag.messages, answer],
            "task": tag.task,
            "source": "given" if tag.kind == "given" else "own",
            "temperature": completion.request.temperature,
        }
        if not whole:
            row["truncated"] = True
            self.truncated += 1
        elif tag.kind in ("free", "openings") and 30 <= len(tokens) <= self.longest_text:
            self.texts.append(text)
        return row

    @property
    def hopeless(self) -> bool:
        """Whether hardly any prompt that the model writes is of use: it would never end."""
        return self.tried >= 1000 and self.kept < 0.02 * self.tried

    @property
    def longest_text(self) -> int:
        """Tokens of a text that is asked about: half of a prompt is left for the rest."""
        return min(150, self.args.max_given_tokens // 2)
