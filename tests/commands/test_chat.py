"""mlx_ifp.chat as its users meet it: through a pipe, and in a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_ifp import generate, load
from mlx_ifp.commands.chat import main
from mlx_ifp.commands.chat.session import Session
from mlx_ifp.errors import IFPError
from mlx_ifp.generation.conversation import Conversation
from mlx_ifp.generation.request import Request
from mlx_ifp.selection.task_library import Task

from ..conftest import run_command

SCRIPT = Path(sys.executable).with_name("mlx_ifp.chat")


@pytest.fixture(scope="module")
def library(tiny_checkpoint, tmp_path_factory):
    """A model and its tokenizer, with a saved task ``poems``; and the folder of its caches."""
    folder = tmp_path_factory.mktemp("cache")
    model, tokenizer = load(tiny_checkpoint, cache_dir=folder)
    text = "You are a poet."
    model.tasks.add(Task("poems", text, model.selector, model.select(text)))
    return model, tokenizer, folder


def test_a_conversation_through_a_pipe(library, tiny_checkpoint, tmp_path):
    model, tokenizer, folder = library
    saved = tmp_path / "chat.jsonl"
    lines = [
        "Name three rivers.", "And a lake, \\", "please.", "", "/task poems", "And a sea?",
        "/keep 0.5", "/task A list of hills.", "/keep 0.25", " /etc is a folder.",
        "/dense", "And a hill?",
        "/stats", "/tasks", f"/save {saved}", f"/save {saved}", "/dance",
    ]  # fmt: skip
    flags = ("--system-prompt", "Be brief.", "-m", 6, "--cache-dir", folder, "--prefill", "pruned")
    done = run_command(
        "chat", "--model", tiny_checkpoint, *flags, stdin="\n".join(lines), cwd=tmp_path
    )
    messages = json.loads(saved.read_text())["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert asked == [
        "Name three rivers.", "And a lake, \nplease.", "And a sea?", "/etc is a folder.",
        "And a hill?",
    ]  # fmt: skip
    # Only answers are on stdout, each as the API gives it to the same conversation.
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    ways = [{}, {}, {"selection": model.tasks.load("poems").selection},
            {"task": "A list of hills.", "keep": 0.25}, {"dense": True}]  # fmt: skip
    for turn, (way, answer) in enumerate(zip(ways, answers, strict=True)):
        before = messages[: 2 * turn + 2]
        way = {"prefill": "pruned"} | way if "dense" not in way else way
        assert answer == generate(model, tokenizer, before, max_tokens=6, **way)
    costs = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert [cost[1:].split(";")[0] for cost in costs] == [
        "activations, k = 64 of 160", "memory, k = 64 of 160", "task poems, k = 64 of 160",
        "activations, k = 64 of 160", "dense, all 160 channels",
    ]  # fmt: skip
    counts = [cost.split("; ")[3].split() for cost in costs]
    new, kept = [int(count[0]) for count in counts], [int(count[3]) for count in counts]
    assert kept[0] == kept[2] == kept[3] == kept[4] == 0 and kept[1] >= new[0] > new[1]
    # What could not be done is said, and the exit code says that there was something.
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert [error.removeprefix("mlx_ifp.chat: error: ")[:30] for error in errors] == [
        "The channels are given; /task TEXT lets a text select some anew."[:30],
        f"{saved} already exists; name another file."[:30],
        "There is no command /dance; /help lists them."[:30],
    ]
    assert "* poems" not in done.stderr and "  poems" in done.stderr
    assert "tokens/s  6 tokens" in done.stderr


@pytest.fixture
def session(library):
    model, tokenizer, _ = library
    return Session(model, Conversation(model, tokenizer, Request("", options={"max_tokens": 4})))


def test_commands_say_what_they_do(session, capsys):
    for line, said in {
        "/task poems": "The saved task poems selects: k = 64 of 160.",
        "/tasks": "* poems             k = 64  You are a poet.",
        "/task": "The first message selects.",
        "/task A song": "This text selects: A song (There is no saved task of that name.)",
        "/keep 32": "k = 32 of 160.",
        "/keep": "k = 64 of 160.",
        "/system Be brief.": "The system prompt is set.",
        "/system": "There is no system prompt.",
        "/reset": "The messages are forgotten.",
        "/dense": "The whole model answers.",
    }.items():
        session.take(line)
        assert capsys.readouterr() == ("", f"{said}\n")
    session.take("/help")
    assert "/task NAME or TEXT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    {
        "/keep some": "'some' is no count",
        "/keep 161": "k must be between 1 and d_ffn = 160",
        "/stats": "There is no answer yet",
        "/stats all": "/stats takes nothing after it",
        "/save": "Name a file",
        "/save x.jsonl": "There is nothing to save yet",
        "/": "There is no command /;",
    }.items(),
)
def test_a_command_that_cannot_be_done_says_why(session, line, said):
    with pytest.raises(IFPError, match=said):
        session.take(line)


def test_sampled_answers_repeat_with_a_seed(library, capsys):
    model, tokenizer, _ = library

    def answers() -> str:
        options = {"max_tokens": 6, "sampler": make_sampler(1.0)}
        session = Session(
            model, Conversation(model, tokenizer, Request("", options=options)), None, 7
        )
        for line in ("Name three rivers.", "/task A song", "And a lake?"):
            session.take(line)
        return capsys.readouterr().out

    # The second time the sub-networks are in memory.
    assert answers() == answers()


@pytest.mark.parametrize("flags", [("--dense", "--task-name", "poems"), ("-m", "0")])
def test_flags_that_cannot_be_are_refused(tiny_checkpoint, monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["mlx_ifp.chat", "--model", str(tiny_checkpoint), *flags])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "mlx_ifp.chat: error: " in said.err


class Terminal:
    """mlx_ifp.chat in a terminal of its own."""

    def __init__(self, *args: object) -> None:
        self._own, other = pty.openpty()
        self._shown = ""
        self.process = subprocess.Popen(
            [SCRIPT, *map(str, args)], stdin=other, stdout=other, stderr=other,
            preexec_fn=lambda: os.login_tty(other),
            env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(other)

    def type(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to a text, as soon as it is there; what comes after it is kept."""
        end = time.monotonic() + 120
        while text not in self._shown:
            ready = select.select([self._own], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self._shown!r}"
            self._shown += os.read(self._own, 65536).decode(errors="replace")
        before, _, self._shown = self._shown.partition(text)
        return before + text

    def interrupt_answer(self) -> None:
        """Press Ctrl-C after the answer's first token."""
        self.read_until("\n")
        while not self._shown:
            self._shown += os.read(self._own, 65536).decode(errors="replace")
        self.type("\x03")
        self.read_until("Stopped.")
        assert "new tokens" in self.read_until("> ")

    def interrupt_line(self) -> None:
        """Press Ctrl-C at the prompt.

        Python's readline misses a signal that comes just before it begins to wait for a key, so
        the key is pressed again if nothing happens.
        """
        for _ in range(60):
            self.type("\x03")
            if self._shown or select.select([self._own], [], [], 2)[0]:
                break
        self.read_until("Ctrl-D ends the chat.")


def test_a_terminal_has_a_prompt_a_history_and_ctrl_c(tiny_checkpoint):
    chat = Terminal("--model", tiny_checkpoint, "-m", 4000, "--no-cache")
    assert "Ctrl-D ends the chat." in chat.read_until("> ")
    chat.type("Name a river.\n")
    chat.interrupt_answer()
    # The arrow brings the last line back.
    chat.type("\x1b[A")
    chat.read_until("Name a river.")
    chat.type("\n")
    chat.interrupt_answer()
    chat.type("half a li")
    chat.read_until("half a li")
    chat.interrupt_line()
    chat.read_until("> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
