"""The dispatcher ``mlx_ifp COMMAND`` and what all commands share."""

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable

from ..errors import IFPError

# Name -> module.
COMMANDS = {
    "benchmark": "mlx_ifp.commands.benchmark.command",
    "cache_prompt": "mlx_ifp.commands.cache_prompt",
    "convert": "mlx_ifp.convert",
    "export": "mlx_ifp.commands.export",
    "generate": "mlx_ifp.commands.generate",
    "manage": "mlx_ifp.commands.manage",
    "plot": "mlx_ifp.commands.plot.command",
    "tasks": "mlx_ifp.commands.tasks",
    "train": "mlx_ifp.commands.train.command",
}


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a ``main`` end as a command should: a user's error is one line, not a traceback."""

    @functools.wraps(main)
    def run() -> None:
        name = os.path.basename(sys.argv[0])
        warnings.formatwarning = lambda message, *_, **__: f"[WARNING] {message}\n"
        try:
            main()
        except IFPError as error:
            _end(f"{name}: error: {' '.join(str(error).split())}", 1)
        except BrokenPipeError:
            # The reader has gone; what is still buffered must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{name}: error: {where}{error.strerror or error}", 1)
        except KeyboardInterrupt:
            _end(f"{name}: interrupted", 130)

    return run


def _end(line: str, code: int) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run ``mlx_ifp COMMAND ...``."""
    usage = (
        f"usage: mlx_ifp COMMAND [options]\n\ncommands: {', '.join(COMMANDS)}\n\n"
        "example: mlx_ifp generate --help"
    )
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("-h", "--help"):
        print(usage)
    elif name == "--version":
        from importlib.metadata import version

        print(version("mlx_ifp"))
    elif name in COMMANDS:
        sys.argv[:2] = [f"mlx_ifp.{name}"]
        try:
            importlib.import_module(COMMANDS[name]).main()
        except ModuleNotFoundError as error:
            if error.name != "mlx_ifp.convert":
                raise
            # In a clone convert/ stands beside the package; the installed one has it inside.
            _end(f"mlx_ifp.{name}: error: The converter is only in the installed package: use the "
                 f"command mlx_ifp.{name}, or leave the clone's root.", 1)  # fmt: skip
    else:
        _end(f"{usage}\n\nmlx_ifp: error: {'no command' if name is None else f'no {name!r}'}", 2)
