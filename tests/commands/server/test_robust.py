"""Clients that go away, long waits and failures, with a scheduler whose events the tests give."""

import json
import socket
import threading
from types import SimpleNamespace

import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.commands.server import handler
from mlx_ifp.commands.server.access import Access
from mlx_ifp.commands.server.listening import Server
from mlx_ifp.commands.server.options import setup_arg_parser
from mlx_ifp.commands.server.service import Service
from mlx_ifp.commands.server.tasks_as_models import Models
from mlx_ifp.generation.ticket import BusyError, ClosedError, Progress, Ticket, Token
from mlx_ifp.subnetwork.prepared import Prepared

SECONDS = 20
READY = Prepared(None, None, "dense", 0.0, 0.0, 0)


class Scripted:
    """A scheduler that hands its tickets to the test."""

    def __init__(self):
        self.alive, self.info = True, SimpleNamespace(running=0, waiting=0)
        self.refusal, self.tickets = None, []
        self.submitted = threading.Semaphore(0)

    def submit(self, request, sampling, *, tokens, segments):
        if self.refusal is not None:
            raise self.refusal
        ticket = Ticket(request, tokens, lambda: None)
        ticket.gone = threading.Event()
        ticket._wake = ticket.gone.set
        self.tickets.append(ticket)
        self.submitted.release()
        return ticket

    def next(self) -> Ticket:
        assert self.submitted.acquire(timeout=SECONDS)
        return self.tickets[-1]


@pytest.fixture(scope="module")
def running(scripted_checkpoint, tmp_path_factory):
    """A server in this process, and its scheduler."""
    model, tokenizer = load(scripted_checkpoint, cache_dir=tmp_path_factory.mktemp("cache"))
    scheduler = Scripted()
    args = setup_arg_parser().parse_args([])
    service = Service(tokenizer, Models(model, "tiny"), Access("127.0.0.1"), args, scheduler)
    server = Server("127.0.0.1", 0, service)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield SimpleNamespace(server=server, scheduler=scheduler, port=server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def settle(ticket: Ticket) -> None:
    """Its sub-network is ready."""
    ticket.ready = READY
    ticket.settle(0)


def send(running, path="/v1/chat/completions", **fields) -> socket.socket:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8} | fields
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def answer(connection: socket.socket) -> tuple[int, str]:
    with connection, connection.makefile("rb") as file:
        head, _, body = file.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["waiting", "reading", "writing"])
def test_a_client_that_goes_away_gives_up_its_place(running, path, stream, when):
    connection = send(running, path, stream=stream)
    ticket = running.scheduler.next()
    if when != "waiting":
        settle(ticket)
    if when == "writing":
        ticket.put(Token(5, "a"))
    assert not ticket.cancelled
    connection.close()
    # Nothing is written meanwhile, so only the connection tells.
    assert ticket.gone.wait(SECONDS) and ticket.cancelled


def test_signs_of_life_come_while_a_prompt_is_read_and_while_nothing_happens(running, monkeypatch):
    monkeypatch.setattr(handler, "KEEPALIVE_SECONDS", 0.05)
    connection = send(running, stream=True)
    ticket = running.scheduler.next()
    with connection, connection.makefile("rb") as file:
        while file.readline() != b": keepalive\n":
            pass
        settle(ticket)
        ticket.put(Token(5, "a"))
        ticket._events.put(Progress(3, 7))
        while file.readline() != b": keepalive 3/7\n":
            pass
        ticket.put(Token(6, "b", finish_reason="length"))
        ticket.end()
        assert file.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [(BusyError("busy"), 429), (ClosedError("closed"), 503), (IFPError("no"), 400)],
)
def test_a_refusal_has_its_status(running, monkeypatch, error, status):
    monkeypatch.setattr(running.scheduler, "refusal", error)
    got, body = answer(send(running, stream=True))
    assert got == status and json.loads(body)["error"]["message"] == str(error)


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_has_its_status(running, stream):
    connection = send(running, stream=stream)
    running.scheduler.next().end(IFPError("It does not fit."))
    status, body = answer(connection)
    assert (status, json.loads(body)["error"]["message"]) == (400, "It does not fit.")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_an_error_in_the_middle_of_a_stream_is_an_event(running, path):
    connection = send(running, path, stream=True)
    ticket = running.scheduler.next()
    settle(ticket)
    ticket.put(Token(5, "a"))
    ticket.end(ValueError("a tensor\nis wrong"))
    status, body = answer(connection)
    last = json.loads(body.strip().rpartition("data: ")[2])
    assert status == 200 and "a tensor" in last["error"]["message"]
    assert "[DONE]" not in body and "message_stop" not in body


def test_a_failed_answer_that_is_not_streamed_is_a_500(running):
    connection = send(running)
    ticket = running.scheduler.next()
    settle(ticket)
    ticket.end(ValueError("a tensor is wrong"))
    assert answer(connection)[0] == 500


def test_connections_are_bounded(running, monkeypatch):
    # Clients of other tests have their places yet.
    assert running.server.wait_idle(SECONDS)
    monkeypatch.setattr(running.server, "_places", threading.BoundedSemaphore(1))
    first = send(running)
    ticket = running.scheduler.next()
    status, body = answer(send(running))
    assert (status, json.loads(body)["error"]["code"]) == (503, "busy")
    ticket.end(IFPError("enough"))
    assert answer(first)[0] == 400
    assert running.server.wait_idle(SECONDS)
