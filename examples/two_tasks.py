"""Two tasks on one small model: what is selected, what it costs, and what a repeat costs.

    python examples/two_tasks.py

Fetches SmolLM2-135M-Instruct, converts it with three quarters of its FFN channels kept, and answers
prompts under two task descriptions with the commands a user would type.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from fetch_smollm2 import FOLDER, fetch

from mlx_ifp.cli.dispatch import script

CHECKPOINT = FOLDER / "ifp"
PROGRAMMER = "You are an expert Python programmer. Write the function, with a short explanation."
GEOGRAPHER = "You are an expert in geography. Answer questions about cities, rivers and countries."
SUM = "Write a Python function that returns the sum of a list of numbers."
PARIS = "What is the capital of France? Describe the city in two sentences."
RIVER = "Which river runs through Cairo?"


def run(command: str, *args: str) -> None:
    """Show a command and run it as a user would."""
    print(f"\n$ mlx_ifp.{command} {shlex.join(args)}", flush=True)
    script = Path(sys.executable).with_name(f"mlx_ifp.{command}")
    done = subprocess.run([script, *args])
    if done.returncode:
        sys.exit(done.returncode)


@script
def main() -> None:
    """Fetch, convert, and generate under two tasks, the second one twice."""
    gguf = os.path.relpath(fetch())
    checkpoint = os.path.relpath(CHECKPOINT)
    model = ("--model", checkpoint)
    if not CHECKPOINT.exists():
        # A prior makes selections better, but the model writes text for it for some minutes.
        options = ("--keep", "0.75", "--no-prior")
        run("convert", "--model", gguf, "--mlx-path", checkpoint, *options)
    # The second task has two prompts. The second of them pays nothing for the selection.
    run("generate", *model, "--task", PROGRAMMER, "--prompt", SUM, "-m", "60")
    run("generate", *model, "--task", GEOGRAPHER, "--prompt", PARIS, "-m", "60", "--show-selection")
    run("generate", *model, "--task", GEOGRAPHER, "--prompt", RIVER, "-m", "60")
    # The whole model is for comparison. Half of the channels is a lot to lose without training.
    run("generate", *model, "--prompt", PARIS, "-m", "60", "--dense")
    run("generate", *model, "--prompt", PARIS, "-m", "60", "--keep", "0.5")


if __name__ == "__main__":
    main()
