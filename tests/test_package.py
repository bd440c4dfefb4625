"""What is installed: wheel, sdist and editable install all carry mlx_ifp.convert."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mlx_ifp.cli.dispatch import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of the repository, and a wheel made of that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
    )
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def install(folder: Path, *args: str) -> Path:
    """Install into a new virtual environment that has this one's packages, but not its mlx_ifp."""
    others = folder / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "mlx_ifp" not in path.name:
            (others / path.name).symlink_to(path)
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    (Path(own.strip()) / "others.pth").write_text(f"{others}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def lines_of(python: Path, code: str) -> list[str]:
    """What a Python program prints."""
    done = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=python.parent
    )
    return done.stdout.splitlines()


def check_installed(python: Path, where: Path) -> None:
    code = "import mlx_ifp, mlx_ifp.convert as c; print(mlx_ifp.__file__); print(c.__file__)"
    for line in lines_of(python, code):
        assert Path(line).is_relative_to(where), line
    # Every command is a script, and there is no script that the dispatcher does not know.
    code = (
        "from importlib.metadata import distribution\n"
        "points = distribution('mlx_ifp').entry_points.select(group='console_scripts')\n"
        "for point in points: print(point.name)"
    )
    assert set(lines_of(python, code)) == {"mlx_ifp", *(f"mlx_ifp.{name}" for name in COMMANDS)}
    for command in COMMANDS:
        script = python.with_name(f"mlx_ifp.{command}")
        done = subprocess.run([script, "-h"], capture_output=True, text=True, cwd=python.parent)
        assert done.returncode == 0, done.stderr
        assert f"usage: mlx_ifp.{command}" in done.stdout


def test_the_wheel_in_a_fresh_environment(built, tmp_path):
    names = zipfile.ZipFile(built[1]).namelist()
    assert "mlx_ifp/convert/sources/gguf.py" in names
    assert "mlx_ifp/commands/server/index.html" in names
    assert not [name for name in names if name.startswith(("convert/", "tests/"))]
    check_installed(install(tmp_path, str(built[1])), tmp_path / "env")


def test_the_sdist_carries_the_license_and_the_sources(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "convert/sources/gguf.py"} <= names


def test_the_editable_install(tmp_path):
    check_installed(install(tmp_path, "-e", str(ROOT)), ROOT)


def test_requirements_are_the_platforms(built):
    with zipfile.ZipFile(built[1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        text = wheel.read(name).decode()
    assert 'Requires-Dist: mlx>=0.32.2; platform_system == "Darwin"' in text
    assert 'Requires-Dist: mlx[cpu]>=0.32.2; platform_system == "Linux"' in text
    assert "License-Expression: Apache-2.0" in text
    assert "torch" not in text.split("Provides-Extra")[0]
