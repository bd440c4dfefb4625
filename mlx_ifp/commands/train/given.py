"""What a user gives ``mlx_ifp.train``: flags and a YAML file become one set of options."""

import argparse
import types
from pathlib import Path
from typing import Any

import yaml
from mlx_lm.lora import yaml_loader

from ...cli.flags import parse_keep
from ...errors import IFPError
from ...selection.keep import Keep
from .options import OPTIONS, defaults, type_of


def options_of(given: dict[str, Any]) -> types.SimpleNamespace:
    """Merge the options: the command line overrides YAML, and YAML overrides the defaults.

    Raises:
        IFPError: if the file is not valid YAML, or an option is unknown or of a wrong type.
    """
    path = given.get("config")
    options = defaults() | (_read(path) if path else {}) | given
    options["keep"] = _keep_of(path, "keep", options["keep"])
    if options["keep_range"] is not None:
        ends = [_keep_of(path, "keep_range", end) for end in options["keep_range"]]
        options["keep_range"] = ends
    return types.SimpleNamespace(**options)


def _keep_of(path: str | None, name: str, value: Any) -> Any:
    """Read a value of ``keep``: a count, or a text of a YAML file such as ``50%``."""
    if not isinstance(value, str):
        return value
    try:
        return parse_keep(value)
    except argparse.ArgumentTypeError as error:
        raise IFPError(f"{path}: {name}: {error}.") from error


def _read(path: str) -> dict[str, Any]:
    """Read the options of a YAML file."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), yaml_loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IFPError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        raise IFPError(f"{path} must hold options, one 'name: value' a line.")
    options = {}
    for name, value in values.items():
        name = str(name).replace("-", "_")
        if name not in OPTIONS:
            raise IFPError(f"{path}: there is no option {name!r}.")
        # As in mlx-lm, an option without a value has its default.
        if value is not None:
            options[name] = _checked(path, name, value)
    return options


def _checked(path: str, name: str, value: Any) -> Any:
    """Check a value of a YAML file; a number is converted to the option's type."""
    kind, choices = type_of(name), OPTIONS[name].metadata["choices"]
    # Python takes a bool for an int, but users do not.
    strange = isinstance(value, bool) and kind is not bool
    if kind is Keep:
        if strange or not isinstance(value, (int, float, str, list)):
            raise IFPError(f"{path}: keep must be a count, a fraction or a list of counts.")
        return value
    if name == "keep_range":
        ends = value if isinstance(value, list) and len(value) == 2 else [None]
        if not all(
            isinstance(end, int | float | str) and not isinstance(end, bool) for end in ends
        ):
            raise IFPError(
                f"{path}: keep_range must be a list of two counts or fractions, such as "
                f"[0.5, 1.0], not {value!r}."
            )
        return value
    if choices is not None and value not in choices:
        raise IFPError(f"{path}: {name} must be one of {', '.join(choices)}, not {value!r}.")
    if strange or not isinstance(value, (int, float) if kind is float else kind):
        named = {bool: "true or false", int: "a number", float: "a number"}
        words = named.get(kind, f"a {kind.__name__}")
        raise IFPError(f"{path}: {name} must be {words}, not {value!r}.")
    return float(value) if kind is float else value
