"""Write the reports of a run to its ``log.jsonl``, to mlx-lm's callbacks and to stdout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tuner.callbacks import TrainingCallback

LOG_FILE = "log.jsonl"


class RunLog:
    """Writes reports: a line of JSON each to ``log.jsonl``, to mlx-lm's callbacks, to stdout.

    Args:
        run (Path): the run's directory; None writes nothing (other ranks).
        callback (TrainingCallback): mlx-lm's, or None.
    """

    def __init__(self, run: Path | None, callback: "TrainingCallback | None" = None) -> None:
        self.run, self.callback = run, callback
        if run is not None and (run / LOG_FILE).exists():
            # A killed process may have left half a line; the next report must begin a new line.
            with open(run / LOG_FILE, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def write(self, report: dict[str, Any], line: str) -> None:
        """Append a report."""
        if self.run is None:
            return
        with open(self.run / LOG_FILE, "a") as file:
            file.write(json.dumps(report) + "\n")
        print(line, flush=True)
        if self.callback is not None and "iteration" in report:
            numbers = {k: v for k, v in report.items() if isinstance(v, (int, float))}
            if "val_loss" in report:
                self.callback.on_val_loss_report(numbers)
            else:
                self.callback.on_train_loss_report(numbers)
