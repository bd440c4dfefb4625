"""``mlx_ifp.benchmark --first-prompt``: each trial is a process, and its seconds are all told."""

import json

import pytest

from ...conftest import run_command


def test_each_trial_is_split_in_stages(tmp_path, predictor_checkpoint):
    file = tmp_path / "figures.json"
    done = run_command(
        "benchmark", "--first-prompt", "--model", predictor_checkpoint, "-n", 2, "--json", file
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    stages = ["imports", "headers", "tokenizer", "trunk", "predictor", "channels", "prefill"]
    assert list(result["seconds"]) == [*stages, "rest"]
    names = [line.rsplit(" s", 1)[0].rsplit(None, 1)[0] for line in done.stdout.splitlines()]
    assert names[-2:] == ["all but prefill", "first token"] and len(names) == 10
    assert len(result["trials"]) == 2
    for trial in result["trials"]:
        assert sum(trial["seconds"].values()) == pytest.approx(trial["total"])
        # Its prompt is new, so it selects and reads.
        assert trial["bytes_read"] > 0


def test_a_trial_that_fails_is_one_line(tmp_path, predictor_checkpoint):
    done = run_command(
        "benchmark", "--first-prompt", "--model", predictor_checkpoint, "--selector", "static"
    )
    assert done.returncode == 1
    assert "static" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [(["--server"], "not both"), (["--chart", "times.png"], "--chart draws networks")],
)
def test_what_does_not_go_with_it_is_said(tmp_path, predictor_checkpoint, more, expected):
    flags = ["--first-prompt", "--model", predictor_checkpoint, *more]
    done = run_command("benchmark", *flags, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
