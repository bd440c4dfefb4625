"""One server process on a tiny checkpoint, for all tests that need no other."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_ifp.convert import convert

from .scripted import make_scripted_model

NAME = "tiny-ifp"


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str):
        """The status and the JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        head = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, head, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def started(folder: Path, *args: object, **env: str) -> Iterator[Running]:
    """A server on a free port; it must end with 0 when it is told to end."""
    script = Path(sys.executable).with_name("mlx_ifp.server")
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [script, "--port", "0", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=os.environ | {"MLX_IFP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"} | env,
        )
    try:
        line = process.stdout.readline()
        found = re.match(r"(http://\S+) serves ", line)
        assert found, line + log.read_text()
        yield Running(process, found[1], log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def scripted_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the scripted model, k = 64 of 128."""
    folder = tmp_path_factory.mktemp("scripted")
    return convert(str(make_scripted_model(folder / "dense")), folder / NAME, keep=64)


@pytest.fixture(scope="session")
def server(scripted_checkpoint, tmp_path_factory) -> Iterator[Running]:
    """A server that answers without a key."""
    options = ["--chat-template-args", '{"enable_thinking": false}', "--max-tokens", 16]
    with started(
        tmp_path_factory.mktemp("server"), "--model", scripted_checkpoint, *options
    ) as running:
        yield running


@pytest.fixture
def task(server) -> Iterator[str]:
    """The id of a task that was made over HTTP."""
    status, made = server.ask(
        "/v1/tasks", {"name": "rivers", "description": "Say what rivers are."}
    )
    assert status == 201, made
    yield made["model"]
    assert server.ask("/v1/tasks/rivers", method="DELETE")[0] == 200
