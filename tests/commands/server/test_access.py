"""Nobody gets in who does not belong: the address, the key, the Host header, and origins."""

import json
import logging
import signal
import socket
import threading
import time

import pytest

from mlx_ifp import IFPError
from mlx_ifp.commands.server import command
from mlx_ifp.commands.server.access import Access
from mlx_ifp.commands.server.command import run
from mlx_ifp.commands.server.options import setup_arg_parser

from .conftest import started

KEY = "a key with ümlauts"
MODELS = "/v1/models"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_address_needs_a_key_or_a_word(host):
    with pytest.raises(IFPError, match="--no-auth"):
        Access(host)
    assert not Access(host, "key").loopback
    assert not Access(host, open_to_all=True).loopback


def test_an_empty_key_is_refused():
    with pytest.raises(IFPError, match="empty"):
        Access("127.0.0.1", " ")


def test_the_command_refuses_an_open_address_before_it_loads(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_IFP_API_KEY", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    args = setup_arg_parser().parse_args(["--host", "0.0.0.0", "--model", str(tmp_path / "none")])
    with pytest.raises(IFPError, match="--no-auth"):
        run(args)


def test_flags_reach_what_serves(scripted_checkpoint, monkeypatch):
    class Stop(Exception):
        pass

    def scheduler(*_, **options):
        raise Stop(options)

    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(command, "Scheduler", scheduler)
    flags = "--prompt-cache-size 3 --prompt-cache-bytes 5MB --decode-concurrency 2"
    flags += " --prompt-concurrency 1 --max-queue 4 --idle-timeout 9 --prefill-step-size 64"
    given = ["--model", str(scripted_checkpoint), *flags.split()]
    with pytest.raises(Stop) as caught:
        run(setup_arg_parser().parse_args(given))
    assert caught.value.args[0] == {
        "kept_prompts": 3, "kv_bytes": 5_000_000, "decode_concurrency": 2, "prompt_concurrency": 1,
        "max_queue": 4, "idle_timeout": 9, "prefill_step_size": 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("127.0.0.1:8080", True), ("localhost", True), ("LOCALHOST:1", True), ("[::1]:8080", True),
        ("127.0.0.2", True), ("evil.example:8080", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False), ("evil.example@127.0.0.1", True), ("[", False),
        ("", False), (None, False), ("192.0.2.1", False),
    ],
)  # fmt: skip
def test_on_loopback_the_host_header_must_name_it(header, known):
    assert Access("127.0.0.1").knows_host(header) is known
    # Elsewhere the key protects it.
    assert Access("0.0.0.0", "key").knows_host(header)


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (None, None, True), (None, "http://localhost:3000", True), (None, "http://[::1]", True),
        (None, "https://127.0.0.1:1", True), (None, "https://evil.example", False),
        (None, "null", False), (None, "file://localhost", False), (None, "http://[", False),
        (["https://me.example"], "https://me.example", True),
        (["https://me.example"], "http://localhost", False),
        (["*"], "https://evil.example", True),
    ],
)  # fmt: skip
def test_pages_of_other_origins_may_not_ask(origins, origin, allowed):
    assert Access("127.0.0.1", origins=origins).allows_origin(origin) is allowed


def test_a_page_elsewhere_is_refused_and_one_here_may_read_the_answer(server):
    evil = {"Origin": "https://evil.example"}
    assert server.ask(MODELS, **evil)[0] == 403
    assert server.ask("/v1/tasks", {"name": "x", "description": "x"}, **evil)[0] == 403
    assert server.ask("/v1/tasks/x")[0] == 404
    here = "Origin: http://localhost:3000"
    head = preflight(server, here, "Access-Control-Request-Headers: authorization,x-stainless-os")
    assert "Access-Control-Allow-Origin: http://localhost:3000" in head
    assert "Access-Control-Allow-Headers: authorization,x-stainless-os" in head
    assert "Allow-Origin" not in preflight(server, "Origin: https://evil.example")


def preflight(server, *headers: str) -> str:
    lines = "".join(f"{header}\r\n" for header in headers)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        sent = f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"
        connection.sendall(sent.encode())
        return connection.makefile("rb").read().decode()


def test_another_name_for_loopback_is_refused(server):
    status, answer = server.ask(MODELS, Host="rebound.example")
    assert (status, answer["error"]["code"]) == (403, "wrong_host")


@pytest.fixture(scope="module")
def locked(scripted_checkpoint, tmp_path_factory):
    """A server with a key, on all addresses, with little memory; its last test ends it."""
    with started(
        tmp_path_factory.mktemp("locked"),
        *("--model", scripted_checkpoint, "--host", "0.0.0.0", "--model-name", "mine"),
        *("--memory-limit", "7MB"),
        MLX_IFP_API_KEY=KEY,
    ) as running:
        yield running


def bytes_of(text: str) -> str:
    """A header value whose bytes are UTF-8, as clients send it."""
    return text.encode().decode("latin-1")


def test_the_key_opens_and_nothing_else_does(locked):
    key = bytes_of(KEY)
    assert locked.ask(MODELS, Authorization=f"Bearer {key}")[0] == 200
    assert locked.ask(MODELS, Authorization=f"bearer {key}")[0] == 200
    status, models = locked.ask(MODELS, x_api_key=key)
    assert (status, [model["id"] for model in models["data"]]) == (200, ["mine", "mine:dense"])
    for headers in (
        {},
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"Authorization": f"Bearer {key}x"},
        {"Authorization": "Bearer "},
        {"x_api_key": key[:-1]},
    ):
        status, answer = locked.ask(MODELS, **headers)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
    assert locked.ask("/health")[0] == 200
    log = locked.log.read_text()
    assert "ümlauts" not in log and bytes_of("ümlauts") not in log


def test_what_never_fits_the_memory_is_refused_with_numbers(locked):
    def ask(count):
        body = {"prompt": "The car", "max_tokens": count}
        return locked.ask("/v1/completions", body, x_api_key=bytes_of(KEY))

    status, refused = ask(2000)
    assert status == 400 and "7.0 MB" in refused["error"]["message"]
    assert ask(2)[0] == 200


def test_ctrl_c_lets_a_running_answer_end_and_takes_no_more(locked):
    """A stream is on its way when the server is told to end, and goes on to its own end."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 100,
        "logit_bias": {"2": -100},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        file = connection.makefile("rb")
        while b'"content": "' not in file.readline():
            pass
        ending = threading.Thread(target=locked.process.send_signal, args=(signal.SIGINT,))
        ending.start()
        rest = file.read()
        ending.join()
    assert rest.endswith(b"data: [DONE]\n\n") or b'"closing"' in rest
    assert locked.process.wait(60) == 0
    with pytest.raises(OSError):
        time.sleep(0.05)
        socket.create_connection(("127.0.0.1", locked.port), timeout=1)
