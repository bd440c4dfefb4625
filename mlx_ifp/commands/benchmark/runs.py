"""The runs of ``mlx_ifp.benchmark``: getting each network, and letting all answer one prompt."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from ...generation.steps import token_steps
from ...llm.kv_cache import Generation, kv_bytes
from ...memory.budget import Estimator
from ...model import IFPModel
from ...selection.selection import Selection
from ...selection.task_library import Task
from ...subnetwork.prepared import Prepared
from .experts import experts_model
from .loading import ColdFiles, cold_seconds, copy_seconds, loading_parts
from .prefill import prefill_seconds
from .same_size import arrays_of, float_dtype, memory_of, same_size_model
from .settings import Settings

ROWS = FIRST, REPEAT, SWITCH, OVERLAPPING, SAME_SIZE, FULL, EXPERTS = (
    "sub-network, first prompt",
    "sub-network, repeat",
    "switch, cached task",
    "switch, overlapping task",
    "dense, same size",
    "full model",
    "mixture of experts",
)
SWITCHES = (SWITCH, OVERLAPPING)
SELECTED = (FIRST, REPEAT, *SWITCHES)
# Tokens to decode before it is the next network's turn. They are so few that all networks meet the
# same disturbances, and so many that the wait at the end, where mlx-lm would run ahead, does not
# count.
TURN = 8
# If more of the files than this is still in memory, "cold" is the wrong word.
_STILL_COLD = 0.05
Run = dict[str, Any]
Trial = dict[str, Any]


class Bench:
    """The networks, the two tasks, and the prompt that all answer.

    Args:
        model (IFPModel): in use.
        tasks (tuple): two texts. Each selection adds a number to one, so that it is new. The first
            may be a Task of the library: its selection is used, and no selector runs for it.
        settings (Settings): of all runs.
    """

    def __init__(self, model: IFPModel, tasks: tuple[str | Task, str], settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.saved = tasks[0] if isinstance(tasks[0], Task) else None
        self._texts = [_numbered(task.text if isinstance(task, Task) else task) for task in tasks]
        self.text = ""
        self.prompt = mx.zeros(0, mx.int32)
        self.networks: dict[str, nn.Module] = {}

    def set_prompt(self, tokens: int) -> None:
        """Random tokens, the same for all networks."""
        self.prompt = mx.random.randint(
            0,
            self.model.checkpoint.config.get("vocab_size") or self.model.tokenizer.vocab_size,
            (tokens,),
            key=mx.random.key(self.settings.seed),
        )

    def first(self) -> Prepared:
        """A text without a selection, and no sub-network that could happen to be its own."""
        self.model.networks.clear()
        mx.clear_cache()
        self.text = next(self._texts[0])
        return self.again()

    def again(self) -> Prepared:
        """The first task's sub-network, as things are."""
        if self.saved is not None:
            return self.model.prepare(selection=self.saved.selection)
        return self.model.prepare(self.text)

    def prepare(self, row: str) -> Prepared:
        """The network of a row, and what getting it costs."""
        if row in self.networks:
            return Prepared(self.networks[row], None, "", 0.0, 0.0, 0)
        return self.first() if row == FIRST else self.again()

    def prepare_all(self) -> dict[str, Prepared]:
        """Prepare all rows, in an order in which each finds what it needs.

        The overlapping task comes while only the first one is in memory; then back to that.
        """
        ready = {FIRST: self.first()}
        ready[OVERLAPPING] = self.model.prepare(next(self._texts[1]))
        ready[SWITCH] = self.again()
        ready[REPEAT] = self.again()
        return {row: ready.get(row) or self.prepare(row) for row in self.rows}

    @property
    def reads_densely(self) -> bool:
        """Whether the whole model reads prompts by default, and can select by this prompt."""
        ifp = self.model.checkpoint.ifp
        fits = self.prompt.size <= ifp.text.max_tokens
        return fits and ifp.prefill_with(self.model.selector) == "dense"

    @property
    def rows(self) -> list[str]:
        """The rows that can be measured."""
        return [row for row in ROWS if row in SELECTED or row in self.networks]

    def run(self, ready: dict[str, Prepared]) -> dict[str, Run]:
        """Let each row but the switches answer the prompt.

        Returns:
            dict: for each row ``source`` and ``bytes_read`` of its Prepared, and seconds. Of
            those that answer: prefill is until the first token is there, decode is all that
            follow, of all samples. ``turn_seconds`` are of each turn of decoding.
        """
        runs: dict[str, Run] = {
            row: {
                "source": have.source,
                "bytes_read": have.bytes_read,
                "select_seconds": have.select_seconds,
                "load_seconds": have.load_seconds,
            }
            for row, have in ready.items()
        }
        tokens: dict[str, Generator[Any]] = {}
        rows = [row for row in ready if row not in SWITCHES]
        left = self.settings.generation_tokens - 1
        # mlx-lm's stream is one of each thread, which the hint of its function does not say.
        streams: list[Any] = [generation_stream]
        with wired_limit(ready[rows[0]].network, streams), ExitStack() as stack:
            for row in rows:
                mx.clear_cache()
                start = time.perf_counter()
                # Each may hold a stream context, so the last to enter must be the first to leave.
                steps = token_steps(
                    self.prompt,
                    ready[row].network,
                    samples=self.settings.samples,
                    prefill_step_size=self.settings.prefill_step_size,
                )
                tokens[row] = stack.enter_context(closing(steps))
                next(tokens[row])
                prefill = time.perf_counter() - start
                # The next token has been begun, and the next row must not wait for it.
                mx.synchronize(generation_stream)
                before = runs[row]["select_seconds"] + runs[row]["load_seconds"]
                runs[row] |= {
                    "prefill_seconds": prefill,
                    "first_token_seconds": before + prefill,
                    "turn_seconds": [],
                }
            for start in range(0, left, TURN):
                for row in rows:
                    began = time.perf_counter()
                    for _ in itertools.islice(tokens[row], min(TURN, left - start)):
                        pass
                    mx.synchronize(generation_stream)
                    runs[row]["turn_seconds"].append(time.perf_counter() - began)
                rows = rows[1:] + rows[:1]
        for row in rows:
            seconds = sum(runs[row]["turn_seconds"])
            runs[row]["decode_seconds"] = seconds
            runs[row]["decode_tps"] = left * self.settings.samples / seconds
        return runs

    def forget(self) -> None:
        """Leave nothing in memory but the trunk."""
        self.networks.clear()
        self.model.networks.clear()
        self.model.release_predictor()
        gc.collect()


def selection_of(ready: Prepared) -> Selection:
    """What a sub-network was made of."""
    assert ready.selection is not None, "only the dense rows have no selection"
    return ready.selection


def _numbered(task: str) -> Iterator[str]:
    """The task with a number, so that it is new each time."""
    return (f"{task} [{i}]" for i in itertools.count())


@dataclass
class Measured:
    """What was measured with one length of the prompt.

    Attributes:
        prompt_tokens: the length.
        selection: the first task's.
        warm_up: row -> its run alone.
        memory: row -> ``weights_bytes``, ``bytes_per_token`` and, of MLX with no other network
            in memory, ``peak_memory_bytes``.
        kv_bytes: the most that the sub-network's key-value cache takes, for each sample.
        predictor_bytes: what it takes in memory besides the trunk; 0 if another selector ran.
        dtype: what the networks compute in.
        trials: each has ``rows``: row -> run; ``overlap`` of the two tasks' selections;
            ``copy_seconds``; ``loading_parts``, what the function of this name gives; ``prefill``,
            what :func:`prefill_seconds` gives, if prompts are read by the whole model; and, if
            asked for, what :func:`cold_seconds` gives.
        notes: what could not be alike.
    """

    prompt_tokens: int
    selection: Selection
    warm_up: dict[str, Run]
    memory: dict[str, dict[str, int]]
    kv_bytes: int
    predictor_bytes: int
    dtype: str
    trials: list[Trial]
    notes: list[str]


def measure(
    bench: Bench,
    prompt_tokens: int,
    *,
    experts: bool = True,
    files: ColdFiles | None = None,
    progress: Callable[[str], Any] = lambda _: None,
) -> Measured:
    """Run each network alone, and then all in turns.

    Args:
        bench (Bench): what runs.
        prompt_tokens (int): length of the prompt.
        experts (bool): with a mixture of experts.
        files (ColdFiles): also load from these, made cold.
        progress (Callable): called with a line of text after each trial.
    """
    model, settings = bench.model, bench.settings
    checkpoint = model.checkpoint
    bench.set_prompt(prompt_tokens)
    warm_up: dict[str, Run] = {}
    memory: dict[str, dict[str, int]] = {}

    def run_alone(row: str) -> Prepared:
        mx.reset_peak_memory()
        ready = bench.prepare(row)
        warm_up.update(bench.run({row: ready}))
        memory[row] = memory_of(ready.network) | {"peak_memory_bytes": mx.get_peak_memory()}
        return ready

    bench.forget()
    run_alone(FIRST)
    uses_predictor = model.selector == "predictor" and bench.saved is None
    predictor = _predictor_bytes(model) if uses_predictor else 0
    ready = run_alone(REPEAT)
    selection = selection_of(ready)
    generation = Generation(
        prompt_tokens, settings.generation_tokens, prefill_step_size=settings.prefill_step_size
    )
    caches = settings.samples * kv_bytes(ready.network, generation)
    same_size, notes = same_size_model(ready.network, checkpoint.ffns)
    del ready
    bench.forget()
    bench.networks[SAME_SIZE] = same_size
    del same_size
    run_alone(SAME_SIZE)
    bench.forget()
    bench.networks[FULL] = model.dense()
    run_alone(FULL)
    bench.forget()
    mixture = None
    if experts:
        network = bench.prepare(REPEAT).network
        mixture, said = experts_model(network, checkpoint.ffns, checkpoint.config, selection.k)
        notes += said
        del network
        bench.forget()
    if mixture is not None:
        bench.networks[EXPERTS] = mixture.network
        run_alone(EXPERTS)
        memory[EXPERTS] |= mixture.memory

    # Now all run in turns. The predictor is loaded before, so that the first trial is like others.
    bench.networks[FULL] = model.dense()
    bench.networks[SAME_SIZE], _ = same_size_model(bench.prepare(FIRST).network, checkpoint.ffns)
    bench.prepare_all()
    trials = []
    for i in range(settings.num_trials):
        trials.append(_trial(bench, i, files))
        runs = trials[-1]["rows"]
        speeds = [f"{r}: {run['decode_tps']:.1f}" for r, run in runs.items() if "decode_tps" in run]
        progress(
            f"{prompt_tokens} tokens in, trial {i + 1} of {settings.num_trials}, "
            f"decode tokens/s: {', '.join(speeds)}"
        )
    return Measured(
        prompt_tokens,
        selection,
        warm_up,
        memory,
        caches,
        predictor,
        str(float_dtype(bench.networks[FULL])).removeprefix("mlx.core."),
        trials,
        notes + _trial_notes(trials, bench.saved),
    )


def _trial(bench: Bench, number: int, files: ColdFiles | None) -> Trial:
    ready = bench.prepare_all()
    first = ready[FIRST]
    trial: Trial = {
        "overlap": selection_of(first).overlap(selection_of(ready[OVERLAPPING]))[0],
        "copy_seconds": copy_seconds(first.bytes_read),
        "loading_parts": loading_parts(bench.model, selection_of(first)),
    }
    rows = list(ready)
    turn = number % len(rows)
    trial["rows"] = bench.run({row: ready[row] for row in rows[turn:] + rows[:turn]})
    if bench.reads_densely:
        step = bench.settings.prefill_step_size
        trial["prefill"] = prefill_seconds(bench.model, bench.prompt.size, step)
    if files is not None:
        trial |= cold_seconds(bench.model, selection_of(first), first.bytes_read, files)
    return trial


def _trial_notes(trials: list[Trial], saved: Task | None) -> list[str]:
    notes = []
    if saved is not None:
        notes.append(f"The selection is that of the saved task {saved.name!r}; none was computed.")
    if trials[0]["rows"][FIRST]["source"] == "memory":
        notes.append("The selection is the same for every text; only the warm-up computed it.")
    if any(trial["rows"][SWITCH]["bytes_read"] for trial in trials):
        notes.append(f"{SWITCH}: two sub-networks did not fit into memory; one was read again.")
    still = statistics.median(trial.get("still_in_memory", 0.0) for trial in trials)
    if still > _STILL_COLD:
        notes.append(f"loading cold: the system kept {still:.0%} of the files in memory.")
    if still < 0:
        notes.append("loading cold: this file system does not tell whether its files were cold.")
    return notes


def _predictor_bytes(model: IFPModel) -> int:
    """What the predictor adds to the trunk; an embedding they share is the trunk's."""
    if model.checkpoint.reads_own_state:
        return Estimator(model.checkpoint, model.dtype).predictor
    trunk = {id(array) for array in arrays_of(model.trunk)}
    predictor = model.predictor
    return sum(
        array.nbytes
        for module in (predictor.body, predictor.head)
        for array in arrays_of(module)
        if id(array) not in trunk
    )
