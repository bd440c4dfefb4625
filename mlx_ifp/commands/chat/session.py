"""A chat line by line: messages are answered, and lines that begin with a slash are commands."""

import argparse
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ...cli.flags import parse_keep
from ...cli.streams import say
from ...errors import IFPError
from ...files.atomic import check_writable, new_file
from ...files.text import write_text
from ...generation.conversation import Conversation
from ...generation.stats import Stats
from ...model import IFPModel
from ...selection.keep import Keep, compact
from ...selection.selection import Selection
from ...selectors.selector import resolved_keep
from .terminal import stopping

_SHORT = 60


class Session:
    """A conversation, and what its user may do with it.

    Answers go to stdout, and everything else goes to stderr.

    Args:
        model (IFPModel): what answers.
        conversation (Conversation): the one that is led.
        task (str): the name of the saved task that selects at the beginning, or None.
        seed (int): for sampling, or None. Each answer counts it up, so that it does not depend on
            what was in a cache.
    """

    def __init__(
        self,
        model: IFPModel,
        conversation: Conversation,
        task: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.conversation = model, conversation
        self.task, self.seed = task, seed
        self._answers = 0
        self._commands: dict[str, tuple[str, Callable[[str], None], str]] = {
            "/task": ("NAME or TEXT", self._task, "a saved task or a description selects; "
                      "without one, the first message does"),
            "/tasks": ("", self._tasks, "list the saved tasks"),
            "/dense": ("", self._dense, "use the whole model, until the next /task"),
            "/keep": ("K or FRACTION", self._keep, "channels to keep in each layer; without a "
                      "number, as many as at the beginning"),
            "/system": ("TEXT", self._system, "set the system prompt, or remove it"),
            "/stats": ("", self._stats, "the figures of the last answer"),
            "/save": ("FILE", self._save, "write the messages to a new file, as a line of JSON"),
            "/reset": ("", self._reset, "forget the messages, and begin anew"),
            "/help": ("", self._help, "this list"),
        }  # fmt: skip
        self._first = conversation.request

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            IFPError: if it cannot be done; the conversation is as it was.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self._reply(line.strip())
            return
        name, argument = [*line.split(maxsplit=1), ""][:2]
        if name not in self._commands:
            raise IFPError(
                f"There is no command {name}; /help lists them. Put a space before a "
                "message that begins with a slash."
            )
        takes, run, _ = self._commands[name]
        if argument and not takes:
            raise IFPError(f"{name} takes nothing after it.")
        run(argument.strip())

    def _reply(self, message: str) -> None:
        """Answer a message, token by token, and say what it cost."""
        conversation, spoken = self.conversation, False
        with stopping() as stop:
            try:
                responses = conversation.reply(message)
                if self.seed is not None:
                    mx.random.seed((self.seed + self._answers) % (1 << 64))
                with contextlib.closing(responses):
                    for response in responses:
                        stop.speaking = spoken = True
                        print(response.text, end="", flush=True)
                        if stop.asked:
                            break
            except KeyboardInterrupt:
                stop.asked = True
            finally:
                stop.speaking = False
                if spoken:
                    print(flush=True)
        self._answers += 1
        if stop.asked:
            say("Stopped." if spoken else "Stopped; the message is forgotten.")
        if spoken:
            say(self._cost())

    def _cost(self) -> str:
        """What was selected, and what it cost, in one line."""
        answer = self.conversation.answer
        assert answer is not None
        stats, selection = answer.stats, answer.ready.selection
        read_by = " read by the whole model" if answer.prefill == "dense" else ""
        parts = [
            f"{self._what_selects(stats)}, {self._width(selection)}",
            f"selected in {stats.select_seconds:.3f} s",
            f"{stats.bytes_read / 1e6:.1f} MB read in {stats.load_seconds:.3f} s",
            f"{stats.prompt_tokens} new tokens{read_by}, {self.conversation.reused} kept",
            f"{stats.decode_tokens} tokens, {stats.decode_tps:.1f} tokens/s",
        ]
        return f"[{'; '.join(parts)}]"

    def _what_selects(self, stats: Stats) -> str:
        return f"task {self.task}" if self.task is not None else stats.source

    def _width(self, selection: Selection | None) -> str:
        d_ffn = self.model.checkpoint.ffns[0].d_ffn
        if selection is None:
            return f"all {d_ffn:,} channels"
        return f"k = {_counts(selection.ks)} of {d_ffn:,}"

    def _select_by(
        self, *, task: str | None = None, named: str | None = None, dense: bool = False
    ) -> None:
        selection = None if named is None else self._of_task(named, self.conversation.request.keep)
        self.task = named
        self.conversation.request = replace(
            self.conversation.request,
            task=task,
            selection=selection,
            dense=dense,
            # The whole model reads what it answers.
            prefill=None if dense else self._first.prefill,
            selector=None,
            prior=None,
        )

    def _of_task(self, name: str, keep: Keep | None) -> Selection:
        """A saved task's channels; one from examples has scores, so that it may keep others."""
        task = self.model.tasks.load(name)
        if keep is None or task.scores is None:
            return task.selection
        return self.model.text_selector.of_scores(mx.array(task.scores), keep)

    def _task(self, argument: str) -> None:
        if not argument:
            self._select_by()
            say("The first message selects.")
        elif argument in self.model.tasks.names():
            self._select_by(named=argument)
            say(f"The saved task {argument} selects: {self._width(self._given())}.")
        else:
            self._select_by(task=argument)
            say(f"This text selects: {_shortened(argument)} (There is no saved task of that name.)")

    def _given(self) -> Selection | None:
        return self.conversation.request.selection

    def _tasks(self, _: str) -> None:
        names = self.model.tasks.names()
        if not names:
            say("There are no saved tasks; mlx_ifp.tasks add makes one.")
        for name in names:
            try:
                task = self.model.tasks.load(name)
                said = f"k = {_counts(task.selection.ks)}  {_shortened(task.text)}"
            except IFPError as error:
                said = f"unusable: {error}"
            say(f"{'*' if name == self.task else ' '} {name:<16}  {said}")

    def _dense(self, _: str) -> None:
        self._select_by(dense=True)
        say("The whole model answers.")

    def _keep(self, argument: str) -> None:
        request, selection = self.conversation.request, None
        scored = self.task is not None and self.model.tasks.load(self.task).scores is not None
        if request.dense or (request.selection is not None and not scored):
            raise IFPError("The channels are given; /task TEXT lets a text select some anew.")
        try:
            keep = parse_keep(argument) if argument else self._first.keep
        except argparse.ArgumentTypeError as error:
            raise IFPError(f"{error}.") from error
        ks = self.model.text_selector.ks
        if keep is not None:
            ks = resolved_keep(self.model.checkpoint, keep)
        if self.task is not None and request.selection is not None:
            selection = self._of_task(self.task, keep)
            ks = selection.ks
        self.conversation.request = replace(request, keep=keep, selection=selection)
        say(f"k = {_counts(ks)} of {self.model.checkpoint.ffns[0].d_ffn:,}.")

    def _system(self, argument: str) -> None:
        self.conversation.system = argument or None
        say("The system prompt is set." if argument else "There is no system prompt.")

    def _stats(self, _: str) -> None:
        answer = self.conversation.answer
        if answer is None:
            raise IFPError("There is no answer yet.")
        say(answer.stats.table())

    def _save(self, argument: str) -> None:
        if not argument:
            raise IFPError("Name a file: /save FILE.")
        if not self.conversation.turns:
            raise IFPError("There is nothing to save yet.")
        path = Path(argument).expanduser()
        check_writable(path)
        row = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False)
        try:
            with new_file(path, overwrite=False) as file:
                write_text(file, f"{row}\n")
        except FileExistsError as error:
            raise IFPError(f"{path} already exists; name another file.") from error
        say(f"{path}: {len(self.conversation.messages)} messages")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        say("The messages are forgotten.")

    def _help(self, _: str) -> None:
        rows = [(f"{name} {takes}".strip(), said) for name, (takes, _, said) in
                self._commands.items()]  # fmt: skip
        rows += [
            ("Ctrl-C", "stop an answer"),
            ("Ctrl-D", "end the chat"),
        ]
        say("\n".join(f"{name:<20}  {said}" for name, said in rows))


def _counts(ks: list[int]) -> str:
    k = compact(ks)
    return f"{k:,}" if isinstance(k, int) else f"{min(k):,}-{max(k):,}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
