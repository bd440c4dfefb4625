"""Commands in processes of their own that need not import MLX and transformers anew.

Of a command's start, two seconds of a core are these imports. A server does them once for all tests
of a worker, and forks for each command. The fork runs the installed script with its own arguments,
streams, environment and working directory, and imports mlx_ifp itself, of which the server has
nothing.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# What may differ between two commands; all else may have been read when the server imported.
OWN = {"MLX_IFP_CACHE", "PYTEST_CURRENT_TEST"}


class Server:
    """The process that forks; it ends with the process that made it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
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
        """Run a script; files are its stdin, stdout and stderr. Threads may do so at once."""
        request = json.dumps([command, dict(os.environ), str(cwd or os.getcwd())]).encode()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with self.lock:
                streams = [file.fileno() for file in (*files, theirs)]
                socket.send_fds(self.socket, [len(request).to_bytes(4)], streams)
                self.socket.sendall(request)
            theirs.close()
            pid = int.from_bytes(_read(ours, 4))
            ours.settimeout(timeout)
            try:
                code = int.from_bytes(_read(ours, 4), signed=True)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout or 0) from None
        return subprocess.CompletedProcess(command, code)


def _fixed(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OWN}


# That of a test which changes nothing: tests/conftest.py forbids the network.
USUAL = _fixed(os.environ) | {"HF_HUB_OFFLINE": "1"}
_servers: list[Server] = []


def run(command: list[str], *, input: str, **kwargs: Any) -> subprocess.CompletedProcess:
    """``subprocess.run(command, capture_output=True, text=True, ...)`` of a Python script.

    It is that where a fork would not be the same: off Linux, with an environment of its own, or
    with variables that libraries read when they are imported.
    """
    same = kwargs.keys() <= {"capture_output", "text", "timeout", "cwd"}
    if sys.platform != "linux" or not same or _fixed(os.environ) != USUAL:
        return subprocess.run(command, input=input, **kwargs)
    if not _servers:
        _servers.append(Server())
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
        head, files, _, _ = socket.recv_fds(connection, 4, 4)
        if not head:
            os._exit(0)  # the tests have ended
        request = _read(connection, int.from_bytes(head))
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    # A fork that forks once more, waits, and says how the command ended.
    connection.close()
    *streams, answer = files
    told = socket.socket(fileno=answer)
    pid = os.fork()
    if pid:
        told.sendall(pid.to_bytes(4))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told.sendall(code.to_bytes(4, signed=True))
        os._exit(0)
    told.close()
    command, environment, cwd = json.loads(request)
    for target, file in enumerate(streams):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    return command


if __name__ == "__main__":
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
