"""Many clients at once, half of which hang up, over HTTP."""

import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ifp import IFPModel, load
from mlx_ifp.commands.server.access import Access
from mlx_ifp.commands.server.listening import Server
from mlx_ifp.commands.server.options import setup_arg_parser
from mlx_ifp.commands.server.service import Service
from mlx_ifp.commands.server.tasks_as_models import Models
from mlx_ifp.generation.batch import Scheduler

from .conftest import NAME, Running

PROMPTS = ["The car", "Name", "What is the", "Write a", "file or", "It is in", "near a tree", "key"]
TASKS = ["cars", "trees", "files", "keys"]
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}, "stream": True}


# Requests for the base: each prompt has a selection of its own.
OF_BASE = (0, 6)


@dataclass
class Inside(Running):
    """A server in this process, whose memory and counts can be seen."""

    model: IFPModel
    scheduler: Scheduler


@contextmanager
def serving(checkpoint: Path, cache: Path, *flags: str) -> Iterator[Inside]:
    """A server in this process."""
    model, tokenizer = load(checkpoint, cache_dir=cache)
    scheduler = Scheduler(model, tokenizer)
    args = setup_arg_parser().parse_args(flags)
    service = Service(tokenizer, Models(model, NAME), Access("127.0.0.1"), args, scheduler)
    server = Server("127.0.0.1", 0, service)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield Inside(None, url, Path(), model, scheduler)
    finally:
        server.shutdown()
        scheduler.close()
        assert server.wait_idle(20)
        server.server_close()
        thread.join()


@pytest.fixture
def inside(scripted_checkpoint, tmp_path):
    """A server in this process, with its own cache."""
    with serving(scripted_checkpoint, tmp_path) as it:
        yield it


def make_tasks(server) -> list[dict]:
    """Requests for the base, four tasks, and the whole model."""
    for name in TASKS:
        made = {"name": name, "description": f"Write about {name}."}
        assert server.ask("/v1/tasks", made)[0] == 201
    models = [NAME, *(f"{NAME}:{name}" for name in TASKS), f"{NAME}:dense"]
    bodies = [
        {"model": models[i % len(models)], "prompt": prompt, "max_tokens": 12}
        for i, prompt in enumerate(PROMPTS)
    ]
    assert [i for i, body in enumerate(bodies) if body["model"] == NAME] == list(OF_BASE)
    return bodies


def answer(server, body) -> str:
    status, said = server.ask("/v1/completions", body)
    assert status == 200, said
    return said["choices"][0]["text"]


def in_company(server, bodies) -> list[str]:
    """The answers to 16 requests at once, half of which are given up in the middle."""
    with ThreadPoolExecutor(2 * len(bodies)) as pool:
        leaving = [pool.submit(hang_up, server, body | LONG) for body in bodies]
        together = list(pool.map(lambda body: answer(server, body), bodies))
        assert [future.result() for future in leaving] == [True] * len(bodies)
    # No answer of 1,500 tokens goes on for a client that has gone.
    end = time.monotonic() + 60
    while server.ask("/health")[1] != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < end
        time.sleep(0.05)
    return together


def test_answers_in_company_are_those_of_a_request_alone_and_memory_comes_back(inside):
    bodies = make_tasks(inside)
    alone = [answer(inside, body) for body in bodies]
    model, scheduler = inside.model, inside.scheduler

    def active() -> int:
        scheduler.kept.shrink(0)
        model.networks.clear()
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    before = active()
    misses, runs = model.networks.info.misses, model.selector_runs
    assert in_company(inside, bodies) == alone
    # Nothing is loaded or selected twice: a network for each task, the dense one, and the base's.
    assert model.networks.info.misses - misses == len(TASKS) + 1 + len(OF_BASE)
    assert model.selector_runs == runs
    assert active() <= before


def test_a_system_prompt_that_was_read_is_there_after_the_next_start(scripted_checkpoint, tmp_path):
    cached, said = [], []
    for text in ("What is the car?", "Name one tree."):
        messages = [
            {"role": "system", "content": "You are a file or a key. " * 4},
            {"role": "user", "content": text},
        ]
        with serving(scripted_checkpoint, tmp_path, "--warm-system-prompt") as it:
            status, answer = it.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 8})
            assert status == 200, answer
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            said.append(it.model.warm.info)
    assert min(cached) > 30
    assert [(info.prefilled > 0, info.loads) for info in said] == [(True, 0), (False, 1)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_server_does_not_grow_with_the_clients_that_hang_up(server):
    bodies = make_tasks(server)

    def resident() -> int:
        pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    try:
        first = in_company(server, bodies)
        before = resident()
        assert in_company(server, bodies) == first
        assert resident() - before < 30e6
    finally:
        for name in TASKS:
            assert server.ask(f"/v1/tasks/{name}", method="DELETE")[0] == 200


def hang_up(server, body) -> bool:
    """Ask for a long answer, and go away after its first words; whether there were some."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + data)
        file = connection.makefile("rb")
        while line := file.readline():
            if b'"text": "' in line:
                return True
    return False
