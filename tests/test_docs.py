"""What the documents say exists: links and anchors, commands and their flags."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mlx_ifp.cli.dispatch import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
        ROOT / "mlx_ifp" / "default_model" / "README.md",
    ]
)
# Flags of other programs that the documents name: pip, pytest, mlx_lm.
FOREIGN = {
    *("--dist", "--adapter-path", "--use-default-chat-template", "--image"),
    *("--quantize-activations", "--train", "--optimizer", "--mask-prompt"),
}
# The changelog names what is gone.
MANUAL = [page for page in PAGES if page.name != "CHANGELOG.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
INVOCATION = re.compile(r"(?:python -m )?\bmlx_ifp\.[a-z_.]*[a-z_](?: [^`\n]*|(?=`))")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page's text; a command that goes on in the next line is one line."""
    return re.sub(r" *\\\n *", " ", page.read_text())


def prose_of(page: Path) -> str:
    """A page without its code blocks and inline code, where brackets are no links."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@cache
def help_of(program: str) -> str:
    """The help of a command (``generate``, ``tasks add``) or of a module (``mlx_ifp.x.y``)."""
    name, *action = program.split()
    script = [str(Path(sys.executable).with_name(f"mlx_ifp.{name}"))]
    if name not in COMMANDS:
        script = [sys.executable, "-m", name]
    done = subprocess.run([*script, *action, "-h"], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, f"{program}: {done.stderr}"
    return done.stdout


def invocations(page: Path) -> list[tuple[str, str]]:
    """The command lines that a page shows, as a program for help_of and the whole line."""
    found = []
    for line in INVOCATION.findall(text_of(page)):
        # What comes after a second program belongs to that one.
        line = re.split(r" (?:&&|\|) ", line)[0]
        module = line.removeprefix("python -m ").split()[0]
        name = module.removeprefix("mlx_ifp.")
        if line.startswith("python -m "):
            found.append((module, line))
        elif name == "tasks" and (action := re.match(r"mlx_ifp\.tasks ([a-z]+)", line)):
            found.append((f"tasks {action[1]}", line))
        elif name in COMMANDS:
            found.append((name, line))
    return found


def has_flag(text: str, flag: str) -> bool:
    return re.search(rf"{re.escape(flag)}(?![\w-])", text) is not None


@cache
def all_flags() -> set[str]:
    """Every flag of every command, and of the scripts in examples/."""
    actions = ("add", "list", "show", "rm", "export", "import")
    programs = [*COMMANDS, *(f"tasks {action}" for action in actions)]
    scripts = [path.read_text() for path in ROOT.glob("examples/**/*.py")]
    programs += ["mlx_ifp.convert.benchmark", "mlx_ifp.commands.benchmark.training"]
    return set(FLAG.findall(" ".join([*map(help_of, programs), *scripts])))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_commands_have_the_flags_that_are_shown(page):
    for program, line in invocations(page):
        said = help_of(program)
        missing = [flag for flag in FLAG.findall(line) if not has_flag(said, flag)]
        assert not missing, f"{name_of(page)}: {line}: no {', '.join(missing)}"


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_flags_that_are_named_exist(page):
    code = " ".join(re.findall(r"`([^`\n]*)`", text_of(page)))
    known = all_flags() | FOREIGN
    assert not set(FLAG.findall(code)) - known


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"| `mlx_ifp.{name}` |" not in readme] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
