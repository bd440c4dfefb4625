"""Many clients at once, half of which hang up, against the real server."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import NAME

PROMPTS = ["The car", "Name", "What is the", "Write a", "file or", "It is in", "near a tree", "key"]
TASKS = ["cars", "trees", "files", "keys"]
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}, "stream": True}


@pytest.fixture(scope="module")
def models(server):
    """The base, four tasks, and the whole model."""
    for name in TASKS:
        made = {"name": name, "description": f"Say what {name} are."}
        assert server.ask("/v1/tasks", made)[0] == 201
    yield [NAME, *(f"{NAME}:{name}" for name in TASKS), f"{NAME}:dense"]
    for name in TASKS:
        assert server.ask(f"/v1/tasks/{name}", method="DELETE")[0] == 200


def test_answers_in_company_are_those_of_a_request_alone(server, models):
    bodies = [
        {"model": models[i % len(models)], "prompt": prompt, "max_tokens": 12}
        for i, prompt in enumerate(PROMPTS)
    ]

    def answer(body):
        status, said = server.ask("/v1/completions", body)
        assert status == 200, said
        return said["choices"][0]["text"]

    alone = [answer(body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        leaving = [pool.submit(hang_up, server, body | LONG) for body in bodies]
        together = list(pool.map(answer, bodies))
        assert [future.result() for future in leaving] == [True] * len(bodies)
    assert together == alone
    # No answer of 1,500 tokens goes on for a client that has gone.
    end = time.monotonic() + 60
    while server.ask("/health")[1] != {"status": "ok", "running": 0, "waiting": 0}:
        assert time.monotonic() < end
        time.sleep(0.05)


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
