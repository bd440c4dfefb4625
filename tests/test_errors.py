"""Errors of other libraries become one line; those of users pass."""

import subprocess
import sys

import pytest

from mlx_ifp.errors import IFPError, one_line, reason_of


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (RuntimeError("\n\nMissing:\n  layers.0\nmore"), "Missing: layers.0"),
        (RuntimeError("it ends in a colon:"), "it ends in a colon:"),
        (ValueError("Unknown: \n a,\n b.\nmore"), "Unknown: a, b."),
        (KeyError("rope_theta"), "KeyError('rope_theta')"),
        (AssertionError(), "AssertionError()"),
        (RecursionError("too deep"), "too deep"),
        (
            ValueError("None of:\n(1) a file,\n(2) a slow one.\nmore"),
            "None of: (1) a file, (2) a slow one.",
        ),
        (
            ValueError("Received 2 parameters:\n" + "a" * 300 + ",\n" + "b" * 300 + "."),
            "Received 2 parameters: " + "a" * 300 + ", ...",
        ),
    ],
)
def test_any_error_becomes_one_line(error, line):
    assert reason_of(error) == line
    with pytest.raises(IFPError) as caught, one_line("The model cannot be read"):
        raise error
    assert str(caught.value) == f"The model cannot be read: {line}"
    assert caught.value.__cause__ is error


def test_a_reason_that_ends_in_a_colon_goes_on_with_its_cause():
    error = ValueError("Validation error for field 'eps':")
    error.__cause__ = TypeError("expected float, got None")
    assert reason_of(error) == "Validation error for field 'eps': expected float, got None"


def test_an_error_of_ours_passes_unchanged():
    own = IFPError("Give --model.")
    with pytest.raises(IFPError) as caught, one_line("The model cannot be read"):
        raise own
    assert caught.value is own


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_a_process_is_not_held_up(stop):
    with pytest.raises(stop), one_line("The model cannot be read"):
        raise stop


def test_narrow_catches_do_not_swallow_it():
    assert IFPError.__bases__ == (Exception,)


def test_the_module_alone_imports_no_library():
    path = reason_of.__code__.co_filename
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('errors', {path!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
