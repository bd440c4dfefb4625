"""Data flows one way: a folder imports only what stands below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a name may import the names of earlier rows only.
LAYERS = (
    ("errors", "choices", "device", "fast_import", "lru"),
    ("files",),
    ("llm",),
    ("checkpoint",),
    ("selection",),
    ("subnetwork",),
    ("dense_pass",),
    ("memory",),
    ("synthesis",),
    ("selectors",),
    ("prompt_cache",),
    ("model",),
    ("opening",),
    ("generation",),
    ("cli",),
    ("evaluation",),
    ("tuner",),
    ("fitting",),
    ("convert",),
    ("commands",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    """Every file of the package but its front door, which imports what it shows."""
    files = [*ROOT.glob("mlx_ifp/**/*.py"), *ROOT.glob("convert/**/*.py")]
    front = {ROOT / "mlx_ifp" / "__init__.py", ROOT / "mlx_ifp" / "__main__.py"}
    return sorted(set(files) - front)


def dotted(path: Path) -> list[str]:
    """The module's name below mlx_ifp, as parts; convert/ is installed inside the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[1:] if parts[0] == "mlx_ifp" else parts


def imported(path: Path) -> set[str]:
    """The folders (or top files) of this package that a file imports, in functions too."""
    package, found = dotted(path)[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = base + (node.module.split(".") if node.module else [])
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mlx_ifp":
            target = node.module.split(".")[1:]
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "mlx_ifp" and len(name) > 1}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: "/".join(dotted(path)))
def test_a_folder_imports_only_what_stands_below_it(path):
    own = dotted(path)[0]
    assert own in RANK, f"{own} has no place in LAYERS"
    above = {name for name in imported(path) - {own} if RANK.get(name, len(RANK)) >= RANK[own]}
    assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}, above it"
