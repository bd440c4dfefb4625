"""The files that the manual shows are in the forms that their programs read."""

import plistlib
import re
from pathlib import Path

import yaml

from mlx_ifp.commands.server.options import setup_arg_parser

MANUAL = (Path(__file__).parents[3] / "docs" / "server.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", MANUAL, re.M | re.S)


def test_the_launchd_plist_starts_the_server():
    (text,) = blocks("xml")
    job = plistlib.loads(text.encode())
    # Keys of launchd.plist(5); launchd ignores a wrong one in silence.
    assert set(job) == {"Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "StandardErrorPath"}
    assert job["RunAtLoad"] is True and job["KeepAlive"] == {"SuccessfulExit": False}
    assert f"gui/$UID/{job['Label']}`" in MANUAL and f"LaunchAgents/{job['Label']}.plist" in MANUAL
    program, *arguments = job["ProgramArguments"]
    assert program.endswith("/mlx_ifp.server")
    assert setup_arg_parser().parse_args(arguments).idle_timeout == 600


def test_the_yaml_files_name_the_server():
    llm, continued = map(yaml.safe_load, blocks("yaml"))
    bases = [model["api_base"] for model in llm]
    bases += [model["apiBase"] for model in continued["models"]]
    assert set(bases) == {"http://127.0.0.1:8080/v1"}


def test_the_python_examples_compile():
    for text in blocks("python"):
        compile(text, "docs/server.md", "exec")
