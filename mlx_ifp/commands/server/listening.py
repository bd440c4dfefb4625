"""The server's socket, and a thread for each of its clients, up to a bound."""

import contextlib
import json
import logging
import socket
import sys
import threading
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, cast

from ...errors import IFPError, reason_of
from .failures import Failure
from .handler import Handler
from .service import Service

MAX_CONNECTIONS = 512


class Server(ThreadingHTTPServer):
    """Listens, and answers with :class:`Handler`.

    Args:
        host, port: the address; port 0 takes one that is free.
        service: what is served.

    Raises:
        IFPError: if the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, service: Service) -> None:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = infos[0]
            own = (str(address[0]), int(address[1]), *address[2:])
            super().__init__(cast(tuple[str, int], own), lambda *args: Handler(service, *args))
        except OSError as error:
            raise IFPError(
                f"{host}, port {port}, cannot be used: {error.strerror or reason_of(error)}. Take "
                "another with --host or --port."
            ) from error
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._idle = threading.Condition()
        self._running = 0

    @property
    def url(self) -> str:
        """Where the server is."""
        host, port = str(self.server_address[0]), self.server_address[1]
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{port}"

    def server_bind(self) -> None:
        """Bind, without asking a name server what this machine is called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to answer a client in a thread of its own, if there is a place for it."""
        if not self._places.acquire(blocking=False):
            failure = Failure(503, "Too many connections are open; try again later.", code="busy")
            body = json.dumps(failure.body).encode()
            head = f"HTTP/1.0 503 Busy\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with contextlib.suppress(OSError):
                request.sendall(head + body)
            self.shutdown_request(request)
            return
        with self._idle:
            self._running += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a client."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no client is being answered; whether that came to be."""
        with self._idle:
            return self._idle.wait_for(lambda: self._running == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what no handler caught; that a client went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            logging.exception("An answer to %s failed", client_address[0])
