"""What must work on the lowest versions that are declared, and on the newest: see .ci/lowest."""

import importlib.util
import pkgutil

import mlx_ifp

from .conftest import run_command

# Each begins with the package of an extra, so it is only imported where that is installed.
WITH_EXTRAS = {"mlx_ifp.evaluation.harness": "lm_eval"}


def test_every_module_imports():
    # Some are scripts, some need matplotlib or torch only when they are used.
    for module in pkgutil.walk_packages(mlx_ifp.__path__, "mlx_ifp."):
        extra = WITH_EXTRAS.get(module.name)
        if extra is not None and importlib.util.find_spec(extra) is None:
            continue
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_a_model_is_converted_and_generates(dense_llama, tmp_path):
    path = tmp_path / "ifp"
    options = ("--keep", 64, "-q", "--q-bits", 4, "--q-group-size", 32, "--no-prior")
    done = run_command("convert", "--model", dense_llama, "--mlx-path", path, *options)
    assert done.returncode == 0, done.stderr
    done = run_command("generate", "--model", path, "-p", "Name three rivers.", "-m", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
