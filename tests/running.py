"""Commands in processes of their own that need not import MLX and transformers anew.

Of a command's start, two seconds of a core are these imports. A server does them once for all tests
of a worker, and forks for each command. The fork runs the installed script with its own arguments,
streams, environment and working directory, and imports mlx_ifp itself, of which the server has
nothing.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What may differ between two commands; all else may have been read when the server imported.
OWN = {"MLX_IFP_CACHE", "PYTEST_CURRENT_TEST"}


class Server:
    """The process that forks; it ends with the process that made it."""

    def __init__(self) -> None:
        self.environment = _fixed(os.environ)
        self.socket, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self._end)

    def _end(self) -> None:
        self.socket.close()
        self.process.wait()

    def run(
        self, command: list[str], files: list[Any], cwd: object, timeout: float | None
    ) -> subprocess.CompletedProcess:
        """Run a script; files are its stdin, stdout and stderr."""
        request = json.dumps([command, dict(os.environ), str(cwd or os.getcwd())]).encode()
        socket.send_fds(self.socket, [len(request).to_bytes(4)], [file.fileno() for file in files])
        self.socket.sendall(request)
        pid = int.from_bytes(self._read(4))
        self.socket.settimeout(timeout)
        try:
            code = int.from_bytes(self._read(4), signed=True)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self.socket.settimeout(None)
            self._read(4)
            raise subprocess.TimeoutExpired(command, timeout or 0) from None
        finally:
            self.socket.settimeout(None)
        return subprocess.CompletedProcess(command, code)

    def _read(self, size: int) -> bytes:
        return _read(self.socket, size)


_servers: list[Server] = []


def run(command: list[str], *, input: str, **kwargs: Any) -> subprocess.CompletedProcess:
    """``subprocess.run(command, capture_output=True, text=True, ...)`` of a Python script.

    It is that where a fork would not be the same: off Linux, with an environment of its own, or
    with variables that libraries read when they are imported.
    """
    if sys.platform == "linux" and "env" not in kwargs and not _servers:
        _servers.append(Server())
    same = kwargs.keys() <= {"capture_output", "text", "timeout", "cwd"}
    if not same or not _servers or _fixed(os.environ) != _servers[0].environment:
        return subprocess.run(command, input=input, **kwargs)
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        stdin.write(input)
        stdin.seek(0)
        files = [stdin, stdout, stderr]
        done = _servers[0].run(command, files, kwargs.get("cwd"), kwargs.get("timeout"))
        for file in files:
            file.seek(0)
        done.stdout, done.stderr = stdout.read(), stderr.read()
        return done


def _fixed(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OWN}


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def serve(connection: socket.socket) -> list[str]:
    """Fork for each request. Only a fork returns, with its script and the arguments."""
    import mlx.nn  # noqa: F401
    import mlx_lm.utils  # noqa: F401
    from mlx_lm.models import cache, llama  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    while True:
        head, files, _, _ = socket.recv_fds(connection, 4, 3)
        if not head:
            os._exit(0)  # the tests have ended
        request = _read(connection, int.from_bytes(head))
        pid = os.fork()
        if pid == 0:
            command, environment, cwd = json.loads(request)
            connection.close()
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(cwd)
            return command
        for file in files:
            os.close(file)
        connection.sendall(pid.to_bytes(4))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(code.to_bytes(4, signed=True))


if __name__ == "__main__":
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
