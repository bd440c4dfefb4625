"""One trial of ``--first-prompt``, in a process of its own: a clock at the stages of a command.

It is run as ``python -m mlx_ifp.commands.benchmark.one_prompt START FILE``, followed by the
arguments of ``mlx_ifp.generate``, which prints and fails as ever.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...cli.dispatch import ending_in_one_line, ready

# Stage -> the function that does it, where its caller looks it up.
STAGES = {
    "headers": ("mlx_ifp.opening", "open_checkpoint"),
    "tokenizer": ("mlx_ifp.opening", "load_tokenizer_of"),
    "trunk": ("mlx_ifp.model", "load_trunk"),
}


def main() -> None:
    """Run the command, and write the seconds of each stage.

    START is the time at which the process was asked for, so ``imports`` has Python's start, too.
    """
    start, file = float(sys.argv[1]), Path(sys.argv[2])
    sys.argv = ["mlx_ifp.generate", *sys.argv[3:], "--stats", str(file)]
    with ending_in_one_line():
        run, args = ready("mlx_ifp.commands.generate")
        seconds = {"imports": time.time() - start}
        for stage, (module, name) in STAGES.items():
            owner = importlib.import_module(module)
            setattr(owner, name, _timed(getattr(owner, name), stage, seconds))
        run(args)
        total = time.time() - start
        stats = json.loads(file.read_text())
        seconds |= {
            "predictor": stats["selection"]["seconds"],
            "channels": stats["load"]["seconds"],
            "prefill": stats["prefill"]["seconds"],
        }
        seconds["rest"] = total - sum(seconds.values())
        figures = {"seconds": seconds, "total": total, "bytes_read": stats["load"]["bytes_read"]}
        file.write_text(json.dumps(figures))


def _timed(
    function: Callable[..., Any], stage: str, seconds: dict[str, float]
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

    return timed


if __name__ == "__main__":
    main()
