"""Import transformers, which mlx-lm needs, without the work that it does twice."""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# The module that reads transformers' sources to learn which names each of them has.
_SCANNER = "transformers.utils.import_utils"


def import_transformers() -> None:
    """Import transformers, whose import reads the sources of its models, once and not twice.

    ``transformers`` and ``transformers.models`` both look through 1,700 files for ``__all__``, and
    the result for a folder is forgotten in between: that is half of the time that importing mlx-lm
    takes. Here it is remembered. If transformers is built otherwise, it is imported as it is.
    """
    if "transformers" in sys.modules:
        return
    # As mlx-lm does before it imports it: that PyTorch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    mender = _Mender()
    sys.meta_path.insert(0, mender)
    try:
        # Whoever needs it says that it is missing.
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers")
    finally:
        sys.meta_path.remove(mender)


class _Mender(MetaPathFinder):
    """Finds the module that scans sources, and mends it before another module uses it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _SCANNER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_mend(module: ModuleType) -> None:
                execute(module)
                mend(module)

            spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


def mend(scanner: Any) -> None:
    """Let a scan of sources remember every folder, and find ``__all__`` without splitting a file.

    Args:
        scanner (module): ``transformers.utils.import_utils``; what it lacks is left out.
    """
    scan = getattr(scanner, "create_import_structure_from_path", None)
    whole = getattr(scan, "__wrapped__", None)
    if whole is not None:
        # It remembers 128 folders, and there are 560.
        scanner.create_import_structure_from_path = functools.cache(whole)
    find = getattr(scanner, "fetch__all__", None)
    if find is not None:
        # The last line that begins with it counts, so what stands before is of no use.
        scanner.fetch__all__ = lambda source: find(source[source.rfind("\n__all__") + 1 :])
