"""The dispatcher ``mlx_ifp COMMAND``, and how every command starts and ends."""

import argparse
import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

from ..errors import IFPError, reason_of
from ..fast_import import import_transformers
from .streams import close_output, discard_output, open_streams, say

# Name -> package.
COMMANDS = {
    "benchmark": "mlx_ifp.commands.benchmark",
    "cache_prompt": "mlx_ifp.commands.cache_prompt",
    "chat": "mlx_ifp.commands.chat",
    "convert": "mlx_ifp.convert",
    "evaluate": "mlx_ifp.commands.evaluate",
    "export": "mlx_ifp.commands.export",
    "fit": "mlx_ifp.commands.fit",
    "generate": "mlx_ifp.commands.generate",
    "manage": "mlx_ifp.commands.manage",
    "plot": "mlx_ifp.commands.plot",
    "server": "mlx_ifp.commands.server",
    "synthesize": "mlx_ifp.commands.synthesize",
    "tasks": "mlx_ifp.commands.tasks",
    "train": "mlx_ifp.commands.train",
}


def entry_point(package: str) -> Callable[[], None]:
    """The ``main`` of a command, for its installed script.

    Args:
        package: the command's. Its module ``options`` has ``setup_arg_parser()``, and its module
            ``command`` has ``run(args)``.
    """

    def main() -> None:
        with ending_in_one_line():
            run, args = ready(package)
            run(args)

    return main


def ready(package: str) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """Read a command's flags, and import what does the work.

    Flags are read first, so that help and a wrong flag answer without MLX. What takes no library
    begins before the rest is imported, which takes a second.

    Args:
        package: as for :func:`entry_point`. If its ``options`` say ``READS_ONE_CHECKPOINT``, the
            system reads what ``--model`` names meanwhile.

    Returns:
        tuple: the command's ``run``, and its arguments.
    """
    options = importlib.import_module(f"{package}.options")
    args = options.setup_arg_parser().parse_args()
    if getattr(options, "READS_ONE_CHECKPOINT", False):
        importlib.import_module("mlx_ifp.cli.early").read_trunk_ahead(args)
    import_transformers()
    run = importlib.import_module(f"{package}.command").run
    # Modules live as long as the process, so the garbage collector need not look at them.
    gc.freeze()
    return run, args


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Make the ``main`` of a script of one file end as a command does."""

    @functools.wraps(main)
    def run() -> None:
        with ending_in_one_line():
            main()

    return run


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """End the process in one line, without a traceback, on a user's error and on Ctrl-C."""
    open_streams()
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_, **__: f"[WARNING] {message}\n"
    try:
        try:
            yield
        except SystemExit:
            close_output()
            raise
        # An error of the output is one line here; at exit it would not be.
        close_output()
    except IFPError as error:
        _end(f"{name}: error: {' '.join(str(error).split())}", 1)
    except BrokenPipeError:
        # Whoever read the output has gone, and wants no more of it.
        discard_output()
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{name}: error: {where}{error.strerror or reason_of(error)}", 1)
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            # A second Ctrl-C ends the process at once, without a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _end(f"{name}: interrupted", 130)


def _end(line: str, code: int) -> None:
    with contextlib.suppress(OSError):
        close_output()
    say(line)
    sys.exit(code)


def main() -> None:
    """Run ``mlx_ifp COMMAND ...``."""
    with ending_in_one_line():
        _dispatch()


def _dispatch() -> None:
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
            package = importlib.import_module(COMMANDS[name])
        except ModuleNotFoundError as error:
            if error.name != "mlx_ifp.convert":
                raise
            # In a clone convert/ stands beside the package; the installed one has it inside.
            _end(f"mlx_ifp.{name}: error: The converter is only in the installed package: use the "
                 f"command mlx_ifp.{name}, or leave the clone's root.", 1)  # fmt: skip
        package.main()
    else:
        _end(f"{usage}\n\nmlx_ifp: error: {'no command' if name is None else f'no {name!r}'}", 2)
