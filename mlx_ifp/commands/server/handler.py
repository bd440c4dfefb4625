"""HTTP: who asks for what, and how the answer is sent."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, ResponseGenerator

from ...generation.ticket import Ticket
from .anthropic import AnthropicForm
from .anthropic import read_messages as read_anthropic
from .checks import MAX_BODY, read_object
from .failures import Failure, bad_request, failure_of
from .forms import Form, Said
from .jobs import Job
from .openai import OpenAIForm, read_chat, read_completion
from .page import page
from .pieces import Piece, Reader
from .service import Service

# Nothing is written for so many seconds at most, while an answer is on its way in a stream.
KEEPALIVE_SECONDS = 5.0
_READ_SECONDS = 60.0
_WRITE_SECONDS = 60.0
_DRAINED = 64 << 20


class Handler(APIHandler):
    """One connection. mlx-lm's handler makes the answers in OpenAI's form.

    Args:
        service: what is served.
        args: what socketserver gives.
    """

    server_version, sys_version = "mlx_ifp", ""
    # Seconds without a byte from a client that has not asked yet.
    timeout = 20

    def __init__(self, service: Service, *args: Any, **kwargs: Any) -> None:
        self.service = service
        self._unread = 0
        self._streaming = False
        # mlx-lm's generator has no part here.
        generator = cast(ResponseGenerator, None)
        super().__init__(generator, *args, system_fingerprint=service.fingerprint, **kwargs)

    # Methods.

    def do_GET(self) -> None:
        """Answer a GET request."""
        self._serve("GET")

    def do_POST(self) -> None:
        """Answer a POST request."""
        self._serve("POST")

    def do_DELETE(self) -> None:
        """Answer a DELETE request."""
        self._serve("DELETE")

    def do_OPTIONS(self) -> None:
        """Tell a browser what a page may ask."""
        self._serve("OPTIONS")

    def _serve(self, method: str) -> None:
        try:
            self._unread = self._content_length()
            self._let_in(method)
            self._route(method)()
        except (ConnectionError, TimeoutError):
            logging.info("%s went away", self.client_address[0])
        except Exception as error:
            failure = failure_of(error)
            if failure.status == 500:
                logging.exception("%s %s", method, self.path)
            if not self._streaming:
                self._fail(failure)

    def _let_in(self, method: str) -> None:
        """Raises Failure unless the request comes from where it may come."""
        access, headers = self.service.access, self.headers
        if not access.knows_host(headers.get("Host")):
            raise Failure(403, "The Host header does not name this server.", code="wrong_host")
        if not access.allows_origin(headers.get("Origin")):
            message = "Pages of this origin may not ask; --allowed-origins names those that may."
            raise Failure(403, message, code="wrong_origin")
        free = method == "OPTIONS" or self._path in ("/", "/health")
        if not free and not access.has_key(headers):
            message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise Failure(401, message, code="invalid_api_key")

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _route(self, method: str) -> Callable[[], None]:
        """What answers a request.

        Raises:
            Failure: if nothing does.
        """
        path = self._path
        fixed: dict[str, dict[str, Callable[[], None]]] = {
            "/": {"GET": self._page},
            "/health": {"GET": self.handle_health_check},
            "/v1/models": {"GET": self.handle_models_request},
            "/v1/chat/completions": {"POST": self._chat},
            "/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/messages": {"POST": self._message},
            "/v1/messages/count_tokens": {"POST": self._count},
            "/v1/tasks": {"GET": self._tasks, "POST": self._new_task},
        }
        methods = fixed.get(path)
        if methods is None and path.startswith("/v1/models/"):
            methods = {"GET": self.handle_models_request}
        if methods is None and path.startswith("/v1/tasks/"):
            methods = {"GET": self._task, "DELETE": self._delete_task}
        if methods is None:
            raise Failure(404, f"There is nothing at {path[:200]}.", code="not_found")
        if method == "OPTIONS":
            return self._preflight
        if method not in methods:
            allowed = ", ".join(methods)
            raise Failure(405, f"{path} takes {allowed}, not {method}.", code="wrong_method")
        return methods[method]

    # What is at the paths.

    def _preflight(self) -> None:
        self._set_completion_headers(204)
        self.end_headers()

    def _page(self) -> None:
        content, policy = page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cache-Control", "no-cache")
        self._send(content)

    def handle_health_check(self) -> None:
        """Say whether requests are served."""
        alive, info = self.service.scheduler.alive, self.service.scheduler.info
        status = {"status": "ok" if alive else "unavailable"}
        counts = {"running": info.running, "waiting": info.waiting}
        self._respond(status | counts, 200 if alive else 503)

    def handle_models_request(self) -> None:
        """Give all models, or one."""
        models, id_ = self.service.models, self._path.removeprefix("/v1/models").lstrip("/")
        self._respond(models.describe(models.find(id_).id) if id_ else models.list())

    def _tasks(self) -> None:
        self._respond(self.service.models.list_tasks())

    def _task(self) -> None:
        models, name = self.service.models, self._path.removeprefix("/v1/tasks/")
        models.task(name)
        self._respond(models.describe_task(name))

    def _new_task(self) -> None:
        self._respond(self.service.models.create_task(self._read_body()), 201)

    def _delete_task(self) -> None:
        self._respond(self.service.models.delete_task(self._path.removeprefix("/v1/tasks/")))

    def _chat(self) -> None:
        self._openai(read_chat(self._read_body(), self.service.jobs))

    def _completion(self) -> None:
        self._openai(read_completion(self._read_body(), self.service.jobs))

    def _openai(self, job: Job) -> None:
        self._answer(job, lambda ticket: OpenAIForm(self, job, ticket, self.service.decode))

    def _message(self) -> None:
        job = read_anthropic(self._read_body(), self.service.jobs)
        self._answer(job, lambda ticket: AnthropicForm(job, ticket))

    def _count(self) -> None:
        job = read_anthropic({"max_tokens": 1} | self._read_body(), self.service.jobs)
        self._respond({"input_tokens": self.service.count(job)})

    # Answers.

    def _answer(self, job: Job, form_of: Callable[[Ticket], Form]) -> None:
        """Generate an answer and send it. A client that goes away frees its place."""
        ticket, reader = self.service.ask(job)
        try:
            self.connection.settimeout(_WRITE_SECONDS)
            with self.service.watcher.watching(self.connection, ticket.cancel):
                if job.stream:
                    self._stream_answer(ticket, reader, form_of(ticket))
                else:
                    self._whole_answer(ticket, reader, form_of(ticket))
        finally:
            if not ticket.over:
                ticket.cancel()

    def _whole_answer(self, ticket: Ticket, reader: Reader, form: Form) -> None:
        said = Said()
        ticket.wait()
        for piece in reader.pieces(ticket.events()):
            said.add(piece)
        _check_there(ticket, said)
        self._respond(form.whole(said))

    def _stream_answer(self, ticket: Ticket, reader: Reader, form: Form) -> None:
        try:
            # While a request waits, its stream has not begun, so that a refusal has its status.
            # Only a client that has waited for long is told that it is not forgotten.
            while not ticket.wait(KEEPALIVE_SECONDS):
                self._begin_stream()
                self._write(b": keepalive\n\n")
            self._begin_stream()
            self._write(*form.begin())
            said = Said()
            for piece in reader.pieces(ticket.events(KEEPALIVE_SECONDS)):
                said.add(piece)
                self._write(*form.piece(piece), *_sign_of_life(piece))
            _check_there(ticket, said)
            self._write(*form.end(said))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            if self._streaming:
                self._write(*form.failed(failure_of(error)))
            raise

    def _begin_stream(self) -> None:
        if not self._streaming:
            self._streaming = True
            self._set_stream_headers(200)
            self.end_headers()

    def _write(self, *events: bytes) -> None:
        if events:
            self.wfile.write(b"".join(events))
            self.wfile.flush()

    # Reading and sending.

    def _content_length(self) -> int:
        given = self.headers.get("Content-Length")
        if given is None:
            return 0
        if not (given.isascii() and given.isdecimal() and len(given) < 16):
            raise bad_request("Content-Length is no number.")
        return int(given)

    def _read_body(self) -> dict[str, Any]:
        """The body as an object.

        Raises:
            Failure: if it is missing, too large, too slow, or no object.
        """
        if self.headers.get("Content-Length") is None:
            raise Failure(411, "Content-Length is missing.")
        if self._unread > MAX_BODY:
            raise Failure(413, f"The body has more than {MAX_BODY:,} bytes.")
        raw, end = bytearray(), time.monotonic() + _READ_SECONDS
        try:
            while self._unread:
                part = self.rfile.read1(min(self._unread, 1 << 16))
                if not part or time.monotonic() > end:
                    break
                raw += part
                self._unread -= len(part)
        except TimeoutError:
            pass
        if self._unread:
            self._unread = 0
            raise Failure(408, "The body did not come whole.")
        return read_object(bytes(raw))

    def _respond(self, body: dict[str, Any], status: int = 200) -> None:
        self._set_completion_headers(status)
        self._send(json.dumps(body).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self._write(content)

    def _fail(self, failure: Failure) -> None:
        try:
            self._respond(failure.body, failure.status)
            self._drain()
        except OSError:
            logging.info("%s went away", self.client_address[0])

    def _drain(self) -> None:
        """Read what is left of a body. A client that still sends would not see the answer."""
        left, end = min(self._unread, _DRAINED), time.monotonic() + 5
        self.connection.settimeout(1)
        while left > 0 and time.monotonic() < end:
            part = self.rfile.read1(min(left, 1 << 16))
            if not part:
                break
            left -= len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server refuses by itself: its words, in OpenAI's form."""
        # 501 is a method that is unknown, and 505 a version.
        status = {501: 405, 505: 400}.get(int(code), int(code))
        self.close_connection = True
        # A request that is no HTTP/1 would be answered without a status.
        self.request_version = "HTTP/1.0"
        self._fail(Failure(status, message or "The request is not HTTP."))

    def _set_cors_headers(self) -> None:
        """Let pages read the answer whose origin may ask."""
        # There are no headers if the request could not be read.
        headers = getattr(self, "headers", None)
        if headers is None or "Origin" not in headers:
            return
        origin = headers["Origin"]
        if not self.service.access.allows_origin(origin):
            return
        self.send_header("Access-Control-Allow-Origin", origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, DELETE")
        # A star would not stand for Authorization.
        wanted = headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
        self.send_header("Access-Control-Allow-Headers", wanted)

    def log_message(self, format: str, *args: Any) -> None:
        """Log through Python's logging."""
        logging.info("%s %s", self.client_address[0], format % args)


def _check_there(ticket: Ticket, said: Said) -> None:
    """Raises ConnectionError if the answer ended because its client has gone."""
    if ticket.cancelled and said.finish_reason is None:
        raise ConnectionAbortedError


def _sign_of_life(piece: Piece) -> list[bytes]:
    if piece.progress is None:
        return []
    return [f": keepalive {piece.progress.done}/{piece.progress.total}\n\n".encode()]
