"""A chat model writes its own training data (Xu et al. 2024, "Magpie", arXiv 2406.08464).

    python synthesize.py --model smollm2 --output data/train.jsonl --minutes 10 --split-valid 400

After the beginning of a user turn a chat model continues with what users ask. What it writes until
the turn ends is a prompt, and what it answers to that prompt alone is the answer. Prompts begin in
three ways: with nothing (``free``), with the first words of a request (``openings``), or with a
text that the model wrote in an earlier answer, to be asked about (``reading``). With
``--prompts`` it also answers given prompts, and with ``--tasks`` it writes prompts for named tasks.

Each line of the output is ``{"messages": [user, assistant], "task": ...}``. ``"truncated": true``
says that the answer was cut: its last token is not followed by the end of a turn.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# Before the imports that take seconds: a time limit counts them.
STARTED = time.perf_counter()
# ruff: noqa: E402

import numpy as np
import torch
import yaml
from generation import Completion, Generator, Request
from output import write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

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
_SENTINEL = "@@USER@@"


def fail(text: str) -> SystemExit:
    return SystemExit(f"synthesize.py: {text}")


class Template:
    """What the chat template puts before and after what a user says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise fail("the model has no chat template; give a chat model.")
        if not tokenizer.is_fast:
            raise fail("the model has no tokenizer.json; give one that has.")
        self.tokenizer = tokenizer
        turn = self._render([{"role": "user", "content": _SENTINEL}], answer=False)
        self.before, found, after = turn.partition(_SENTINEL)
        end = tokenizer.encode(after, add_special_tokens=False)[:1] if found else []
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        if not end or end[0] not in self.special:
            raise fail("the chat template ends a user's turn with no special token.")
        self.end = end[0]
        # Most templates put a user's words between two texts; then so can we, which is faster.
        turn = self._render([{"role": "user", "content": _SENTINEL}], answer=True)
        self.after = turn.rpartition(_SENTINEL)[2]
        words = " a\n b "
        turn = self._render([{"role": "user", "content": words}], answer=True)
        self.plain = turn == self.before + words + self.after

    def _render(self, messages: list[dict[str, str]], answer: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that hold their special tokens already."""
        if not texts:
            return []
        # What transformers puts around the tokenizer takes longer than the tokenizer.
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Texts of token ids, with their special tokens."""
        return self.tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)

    def beginnings(self, earlier: list[list[dict[str, str]]], openings: list[str]) -> list[str]:
        """User turns that begin with some words, after earlier messages."""
        texts = []
        for messages, opening in zip(earlier, openings, strict=True):
            turn = self.before
            if messages:
                turn = self._render(
                    [*messages, {"role": "user", "content": _SENTINEL}], answer=False
                ).partition(_SENTINEL)[0]
            texts.append(turn + opening)
        return texts

    def questions(self, prompts: list[list[dict[str, str]]]) -> list[str]:
        """Conversations that wait for an answer."""
        return [
            self.before + messages[0]["content"] + self.after
            if self.plain and len(messages) == 1 and messages[0]["role"] == "user"
            else self._render(messages, answer=True)
            for messages in prompts
        ]


def find_loop(tokens: list[int], longest: int = 64, least: int = 24) -> int | None:
    """Where a text that goes round in circles should end, or None if it does not.

    A loop is a piece of at most ``longest`` tokens that stands there three times in a row and takes
    ``least`` tokens beyond the first. The first two copies stay.
    """
    pieces = len(tokens) - 7
    # Quick to see: in a loop, pieces of eight tokens come again.
    if pieces < 2 or len({tuple(tokens[i : i + 8]) for i in range(pieces)}) == pieces:
        return None
    ids = np.array(tokens)
    ends = []
    for period in range(1, min(longest, len(ids) // 3) + 1):
        differ = np.flatnonzero(ids[period:] != ids[:-period])
        edges = np.concatenate([[-1], differ, [len(ids) - period]])
        runs = np.diff(edges) - 1
        long = np.flatnonzero(runs >= max(2 * period, least))
        if len(long):
            ends.append(int(edges[long[0]]) + 1 + 2 * period)
    return min(ends, default=None)


class Duplicates:
    """Knows texts by their word trigrams."""

    def __init__(self, share: float = 0.8) -> None:
        self.share = share
        self.whole: set[int] = set()  # of texts, word by word
        self.last: dict[int, int] = {}  # of a trigram: the last text that had it
        self.count = 0

    def add(self, text: str) -> bool:
        """Whether most trigrams of a text are those of one earlier text; if not, it is kept."""
        words = re.findall(r"\w+", text.lower())[:100]
        trigrams = {hash(tuple(words[i : i + 3])) for i in range(max(1, len(words) - 2))}
        text_id = hash(tuple(words))
        seen = Counter(self.last[trigram] for trigram in trigrams if trigram in self.last)
        most = seen.most_common(1)[0][1] if seen else 0
        if text_id in self.whole or most >= self.share * len(trigrams):
            return True
        self.whole.add(text_id)
        self.last.update(dict.fromkeys(trigrams, self.count))
        self.count += 1
        return False


def why_not(text: str, tokens: list[int], special: set[int]) -> str | None:
    """Why a prompt is no use, in a word; None if it is fine.

    Odd prompts stay: the model is to behave as the dense one on what it has never seen, too.
    """
    if not special.isdisjoint(tokens) or "\ufffd" in text:
        return "special tokens"
    if len(text) < 3 or not re.search(r"\w", text):
        return "empty"
    words = re.findall(r"\w+", text.lower())
    most = Counter(words).most_common(1)[0][1]
    if find_loop(tokens) is not None or (len(words) > 20 and most > 0.3 * len(words)):
        return "repetition"
    return None


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
        reason = why_not(text, tokens, self.template.special)
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


def parse_mix(text: str) -> list[tuple[str, float]]:
    """``free=0.5,openings=0.5`` as pairs."""
    pairs = []
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            pairs.append((name.strip(), float(share)))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not KIND=SHARE") from None
        if pairs[-1][0] not in PROMPT_TEMPERATURE or pairs[-1][1] < 0:
            raise argparse.ArgumentTypeError(f"kinds are {', '.join(PROMPT_TEMPERATURE)}")
    return pairs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a chat model: a transformers directory")
    add("--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--count", type=int, help="rows with prompts of the model's own (default: no limit)")
    add("--minutes", type=float, help="when to stop; what is unfinished then is kept as truncated")
    add("--prompts", type=Path, metavar="FILE.jsonl", help="given prompts, to be answered too")
    add("--prompts-count", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--tasks",
        type=Path,
        metavar="FILE.yaml",
        help="task names, each with a description or a list of sentences that users say",
    )
    add(
        "--mix",
        type=parse_mix,
        metavar="KIND=SHARE,...",
        help="how own prompts begin (default: free=0.5,openings=0.3,reading=0.2; "
        "with --tasks: tasks=1)",
    )
    add(
        "--split-valid",
        type=int,
        default=0,
        metavar="N",
        help="move N rows to FILE-valid.jsonl in the end, half of them of given prompts",
    )
    add(
        "--valid-prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="given prompts for FILE-valid.jsonl; never for the other file",
    )
    add("--valid-prompts-count", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--answer-temperature",
        type=float,
        nargs="+",
        default=[0.7, 0.0, 1.0],
        help="one of these is drawn for each answer (default: 0.7 0 1)",
    )
    add("--prompt-temperature", type=float, default=1.0, help="a factor (default: 1)")
    add("--top-p", type=float, default=0.95)
    add("--max-prompt-tokens", type=int, default=128, help="that are sampled for a prompt")
    add("--max-answer-tokens", type=int, default=256)
    add(
        "--max-given-tokens",
        type=int,
        default=384,
        help="of a whole prompt with its template; longer ones are left out",
    )
    add("--batch-size", type=int, help="texts at once (default: what fits into the GPU)")
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on a GPU, else float32",
    )
    add("--device", help="default: cuda if there is one, else cpu")
    add("--no-graphs", action="store_true", help="run without CUDA graphs")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="append to a file that exists")
    add("--report", type=Path, metavar="FILE.json", help="write counts and speed there")
    return parser  # fmt: skip


def check_args(args: argparse.Namespace, valid: Path) -> None:
    if args.count is None and args.minutes is None and not args.prompts:
        raise fail("say when to stop: --count, --minutes or --prompts.")
    if args.mix is None:
        mix = "tasks=1" if args.tasks else "free=0.5,openings=0.3,reading=0.2"
        # Without a number of own rows, given prompts alone are answered.
        args.mix = parse_mix(mix) if args.count is not None or args.minutes else []
    if any(kind == "tasks" for kind, _ in args.mix) and not args.tasks:
        raise fail("tasks in --mix needs --tasks FILE.yaml.")
    if sum(share for _, share in args.mix) <= 0 and args.mix:
        raise fail("--mix needs a share above 0.")
    if min(args.answer_temperature) < 0 or not 0 < args.top_p <= 1:
        raise fail("temperatures cannot be below 0, and --top-p is above 0 and at most 1.")
    for path in (args.output, valid):
        if path.exists() and not args.resume:
            raise fail(f"{path} exists; add --resume to append to it, or name another --output.")
    if not Path(args.model).is_dir():
        raise fail(f"{args.model} is no directory; give a transformers model's.")


def load_model(args: argparse.Namespace) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        llm = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise fail(f"{args.model} is no chat model that transformers loads: {reason}") from error
    return llm.to(device).eval(), tokenizer


def end_tokens(llm: torch.nn.Module) -> list[int]:
    """Ids that end an answer, as ``generate`` has them."""
    ids = getattr(llm.generation_config, "eos_token_id", None)
    ids = llm.config.get_text_config().eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    valid = args.output.with_name(f"{args.output.stem}-valid{args.output.suffix}")
    check_args(args, valid)
    chance = random.Random(args.seed)
    given = given_prompts(args.prompts, args.prompts_count, chance) if args.prompts else []
    held_out = []
    if args.valid_prompts:
        held_out = given_prompts(args.valid_prompts, args.valid_prompts_count, chance)
    llm, tokenizer = load_model(args)
    old, old_valid = existing_rows(args.output), existing_rows(valid)
    # What comes next must not be what came first.
    args.seed += len(old) + len(old_valid)
    torch.manual_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(args.output, "a", encoding="utf-8") as train_file,
        open(valid, "a", encoding="utf-8") as valid_file,
    ):
        synthesis = Synthesis(tokenizer, args, {False: train_file, True: valid_file})
        synthesis.mix = dict(args.mix)
        done = set()
        for row in old + old_valid:
            users = [m for m in row["messages"] if m["role"] == "user"]
            done.add(users[0]["content"])
            if row.get("source") == "own":
                synthesis.duplicates.add(users[0]["content"])
                synthesis.own += 1
        in_valid = {p["messages"][-1]["content"] for p in held_out}
        for prompts, is_valid in ((given, False), (held_out, True)):
            synthesis.add_given(
                (
                    p
                    for p in prompts
                    if p["messages"][-1]["content"] not in done
                    and (is_valid or p["messages"][-1]["content"] not in in_valid)
                ),
                is_valid,
            )
        longest = args.max_given_tokens + max(args.max_answer_tokens, args.max_prompt_tokens)
        stops = [synthesis.template.end, *end_tokens(llm)]
        try:
            generator = Generator(
                llm, stops, longest, args.batch_size, args.top_p, graphs=not args.no_graphs
            )
            until = None
            if args.minutes:
                until = STARTED + 60 * args.minutes
                # Prompts that begin in the last seconds would get no answers.
                synthesis.no_more_prompts_at = until - min(10, 0.1 * 60 * args.minutes)
            stats = generator.run(synthesis.next_requests, synthesis.on_complete, until)
        except torch.cuda.OutOfMemoryError as error:
            raise fail("out of GPU memory; lower --batch-size. Written rows are kept.") from error
    if valid.stat().st_size == 0:
        valid.unlink()
    moved = 0
    if args.split_valid:
        moved = split_valid(args.output, valid, args.split_valid, random.Random(args.seed))
    if synthesis.hopeless:
        print(
            f"[WARNING] {synthesis.kept} of {synthesis.tried:,} prompts were of use, so no more "
            "were written; it takes a chat model that knows what users say."
        )
    report = {
        "rows": dict(synthesis.rows),
        "truncated": synthesis.truncated,
        "rejected": dict(synthesis.rejected),
        "valid_rows": moved or len(existing_rows(valid)),
        "batch_size": generator.slots,
        "sampled_tokens": stats.sampled,
        "prompt_tokens": stats.prompt,
        "generation_seconds": stats.seconds,
        "tokens_per_second": stats.sampled / max(stats.seconds, 1e-9),
        "seconds": time.perf_counter() - STARTED,
        "notes": stats.notes,
    }
    if args.report:
        write_text(args.report, json.dumps(report, indent=2) + "\n")
    print(
        f"{args.output}: {sum(synthesis.rows.values()):,} new rows "
        f"({', '.join(f'{n:,} {task}' for task, n in sorted(synthesis.rows.items()))}), "
        f"{synthesis.truncated:,} truncated, {sum(synthesis.rejected.values()):,} refused "
        f"({', '.join(f'{n:,} {why}' for why, n in synthesis.rejected.most_common())}); "
        f"{stats.sampled:,} tokens in {stats.seconds:.0f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
