"""``mlx_ifp.benchmark --server``: many requests at once, against mlx-lm's server.

Three servers run, each a process of its own:

- ``mlx_ifp.server``, with four named tasks;
- ``mlx_lm.server`` on the exported sub-network of the first of these tasks;
- ``mlx_lm.server`` on the exports of all four, which it loads as requests ask for them.

In a trial each row's requests are sent at once, from a thread each, while the other servers are
idle. The order of the rows rotates, so a machine that slows down slows all of them: read the
ratios, which are formed trial by trial.
"""

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import IFPError
from ...model import IFPModel
from ...selection.task_library import Task, TaskLibrary
from ..export.stock_model import export

TASKS = {
    "python": "You are an expert Python programmer. Answer with working code.",
    "french": "Translate the user's text into French.",
    "geography": "Answer questions about cities, rivers and countries.",
    "summary": "Sum up the user's text in one sentence.",
}
SEVERAL, ONE_TASK = "mlx_ifp.server, 4 tasks", "mlx_ifp.server, one task"
DENSE = "mlx_ifp.server, 4 tasks, dense prefill"
STOCK, CHANGING = "mlx_lm.server, one export", "mlx_lm.server, 4 exports"
# Row, what it is divided by.
RATIOS = ((SEVERAL, STOCK), (ONE_TASK, STOCK), (DENSE, STOCK), (SEVERAL, CHANGING))
# The numbers stand first, as kept keys and values of a common beginning would hide its cost.
_TEXT = (
    "{}.{}.{}: a river begins in the mountains, passes three towns and two lakes, and ends in the "
    "sea. Its longest bridge was built by a thousand people. Say what you think about it."
)
_SECONDS = 600
# mlx_lm.server lets five clients wait to be accepted, and the connections of more may break off.
_STOCK_SERVER = (
    "import socketserver; socketserver.TCPServer.request_queue_size = 128; "
    "from mlx_lm.server import main; main()"
)


@dataclass(frozen=True)
class Asked:
    """What one request got: seconds until its first text and until its end, and its tokens."""

    first: float
    last: float
    tokens: int


@contextmanager
def _server(*command: str, environment: dict[str, str], log: Path) -> Iterator[str]:
    """A server on a free port of this machine, as host:port; it ends with the block."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), "--log-level", "ERROR"],
            env=os.environ | environment,
            stdout=said,
            stderr=said,
        )
    try:
        _wait_for(process, port, log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise IFPError(f"A server did not start: {lines[-1] if lines else 'it said nothing'}")


def _ask(address: str, body: dict[str, Any]) -> Asked:
    """Send a request, and read its answer as it comes."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection(address, timeout=_SECONDS)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise IFPError(f"A server refused a request: {response.read(1000).decode()}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        said = json.loads(line[6:])
        if said.get("usage"):
            tokens = said["usage"]["completion_tokens"]
        if not first and any(choice["delta"].get("content") for choice in said["choices"]):
            first = time.perf_counter() - start
    connection.close()
    last = time.perf_counter() - start
    # An answer may have no text.
    return Asked(first or last, last, tokens)


def _at_once(address: str, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Send requests at once; the figures of a row in a trial."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = list(pool.map(lambda body: _ask(address, body), bodies))
    seconds = time.perf_counter() - start
    firsts = [one.first for one in asked]
    return {
        "tokens_per_second": sum(one.tokens for one in asked) / seconds,
        "first_token_seconds": statistics.median(firsts),
        "last_first_token_seconds": max(firsts),
        "tokens": sum(one.tokens for one in asked),
        "seconds": seconds,
    }


def _export(model: IFPModel, directory: Path, cache: Path) -> list[str]:
    """Name the tasks for the server, and write their sub-networks for mlx-lm, in one type."""
    library, paths = TaskLibrary(model.checkpoint, cache), []
    for name, text in TASKS.items():
        selection = model.select(text)
        library.add(Task(name, text, model.selector, selection))
        path = directory / name
        export(model.checkpoint, model.tokenizer, path, selection)
        for file in path.glob("*.safetensors"):
            _cast(file, model.dtype)
        paths.append(str(path))
    return paths


def _cast(path: Path, dtype: mx.Dtype | None) -> None:
    """Cast the floats of a file to the type that the other server runs in."""
    if dtype is None:
        return
    arrays: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    cast = {
        name: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in arrays.items()
    }
    mx.eval(cast)
    mx.save_safetensors(str(path), cast, {"format": "mlx"})


def serve_and_measure(
    model: IFPModel,
    directory: Path,
    *,
    requests: int,
    max_tokens: int,
    trials: int,
    options: list[str],
    progress: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Measure all rows.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`; only its selector and its channels are used.
        directory (Path): empty; gets exports and tasks.
        requests (int): how many are sent at once.
        max_tokens (int): tokens of an answer, at most.
        trials (int): how often each row is measured, after one time that warms up.
        options (list): more of the command line of ``mlx_ifp.server``.
        progress (Callable): called with a line of text after each trial.

    Returns:
        dict: for each row the median figures over the trials, and the median ratios of tokens a
        second.

    Raises:
        IFPError: if a server does not start, or refuses a request.
    """
    cache = directory / "cache"
    exports = _export(model, directory, cache)
    names = list(TASKS)
    trial_figures: list[dict[str, dict[str, float]]] = []
    logs: list[Path] = []
    with ExitStack() as stack:

        def start(*command: str) -> str:
            environment = {"MLX_IFP_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
            log = directory / f"server-{len(logs)}.log"
            logs.append(log)
            return stack.enter_context(_server(*command, environment=environment, log=log))

        ours = start("-m", "mlx_ifp", "server", "--model-name", "model", *options)
        stock = start("-c", _STOCK_SERVER, "--model", exports[0])
        changing = start("-c", _STOCK_SERVER, "--model", exports[0])

        def bodies(
            trial: int, row: int, which: Callable[[int], dict[str, Any]]
        ) -> list[dict[str, Any]]:
            return [
                {
                    "messages": [{"role": "user", "content": _TEXT.format(i, row, trial)}],
                    "max_tokens": max_tokens,
                    "temperature": 0.0,
                }
                | which(i)
                for i in range(requests)
            ]

        def task(i: int) -> str:
            return f"model:{names[i % 4]}"

        rows: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
            SEVERAL: (ours, lambda i: {"model": task(i), "prefill": "pruned"}),
            ONE_TASK: (ours, lambda i: {"model": task(0), "prefill": "pruned"}),
            DENSE: (ours, lambda i: {"model": task(i), "prefill": "dense"}),
            STOCK: (stock, lambda i: {"model": exports[0]}),
            CHANGING: (changing, lambda i: {"model": exports[i % 4]}),
        }
        for trial in range(trials + 1):
            order = list(rows)
            order = order[trial % len(order) :] + order[: trial % len(order)]
            figures = {}
            for row, name in enumerate(order):
                address, which = rows[name]
                try:
                    figures[name] = _at_once(address, bodies(trial, row, which))
                except OSError as error:
                    raise IFPError(f"{name}: the connection broke off ({error}).") from error
            # The first one warms up.
            if trial:
                trial_figures.append(figures)
            speeds = ", ".join(f"{n} {figures[n]['tokens_per_second']:.1f}" for n in rows)
            progress(f"trial {trial} of {trials}, tokens/s: {speeds}")
    return summary(trial_figures)


def summary(trials: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over trials of each row's figures, and of ratios that are formed in each trial."""

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    rows = {
        row: {name: median(trial[row][name] for trial in trials) for name in trials[0][row]}
        for row in trials[0]
    }
    speed = "tokens_per_second"
    ratios = {
        f"{row} / {other}": median(trial[row][speed] / trial[other][speed] for trial in trials)
        for row, other in RATIOS
        if row in trials[0] and other in trials[0]
    }
    return {"rows": rows, "ratios": ratios, "trials": trials}


def serving_table(result: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [f"{'':<40} {'tokens/s':>9} {'first token s':>14} {'the last one s':>15}"]
    for row, figures in result["rows"].items():
        lines.append(
            f"{row:<40} {figures['tokens_per_second']:>9.1f} "
            f"{figures['first_token_seconds']:>14.3f} {figures['last_first_token_seconds']:>15.3f}"
        )
    lines += ["", "tokens/s, ratios"]
    lines += [f"{name:<68} {ratio:>6.3f}" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)
