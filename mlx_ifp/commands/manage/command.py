"""``mlx_ifp.manage``: list and clear the selections and warm prompts kept on disk."""

import argparse
import time
from pathlib import Path

from mlx_lm.manage import tabulate
from safetensors import SafetensorError, safe_open

from ...errors import IFPError
from ...prompt_cache.files import WarmPromptFiles
from ...selection.disk_cache import SelectionCache
from ...selection.files import load_selection


def _size_and_last_use(path: Path) -> tuple[int, str]:
    stat = path.stat()
    return stat.st_size, time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime))


def _describe(path: Path) -> list[str | int]:
    """A row of the list; a damaged file is listed too, so that it can be deleted."""
    size, when = _size_and_last_use(path)
    try:
        selection = load_selection(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata()
    except (IFPError, SafetensorError, OSError):
        return ["(damaged)", "", "", "", size, when]
    return [
        metadata.get("model", ""),
        metadata.get("selector", ""),
        len(selection.layers),
        str(selection.k),
        size,
        when,
    ]


def _describe_warm(path: Path) -> list[str | int]:
    size, when = _size_and_last_use(path)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return ["(damaged)", "", size, when]
    # mlx-lm stores ours among its own, with a number before it that depends on its version.
    metadata = {name.partition(".")[2]: value for name, value in metadata.items()}
    return [metadata.get("model", ""), metadata.get("tokens", ""), size, when]


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.manage``."""
    cache = SelectionCache(args.cache_dir)
    rows = [(path, _describe(path)) for path in cache.entries()]
    rows = [(path, row) for path, row in rows if args.pattern in str(row[0])]
    files = WarmPromptFiles(cache.directory)
    warm = [(path, _describe_warm(path)) for path in files.entries()]
    warm = [(path, row) for path, row in warm if args.pattern in str(row[0])]
    if args.scan:
        print(f"Selections in {cache.directory}")
        headers = ["MODEL", "SELECTOR", "LAYERS", "K", "BYTES", "LAST USED"]
        print(tabulate([row for _, row in rows], headers))
        if warm:
            print(f"Warm prompts in {files.directory}")
            print(tabulate([row for _, row in warm], ["MODEL", "TOKENS", "BYTES", "LAST USED"]))
    else:
        for path, _ in rows + warm:
            path.unlink(missing_ok=True)
        also = f" and {len(warm)} warm prompts" if warm else ""
        print(f"Deleted {len(rows)} selections{also} from {cache.directory}")
