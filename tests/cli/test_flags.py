"""What flags share with mlx-lm stands here too, so that help need not import it: it is equal."""

import argparse
import importlib

import pytest
from mlx_lm.generate import str2bool
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.utils import _parse_size

from mlx_ifp import choices
from mlx_ifp.cli.flags import parse_bool, parse_size
from mlx_ifp.commands.train.options import defaults
from mlx_ifp.convert.layouts import TRAINED


def test_the_choices_are_mlx_lms():
    # mlx_lm.convert names a function, too.
    parser = importlib.import_module("mlx_lm.convert").configure_parser()
    theirs = {action.dest: action.choices for action in parser._actions}
    assert list(choices.DTYPES) == theirs["dtype"]
    assert list(choices.RECIPES) == theirs["quant_predicate"]
    assert list(choices.QUANTIZATION_MODES) == theirs["q_mode"]


def test_the_layouts_are_those_that_are_read():
    assert (*TRAINED, "dense") == choices.LAYOUTS


def test_the_default_of_lora_parameters_is_mlx_lms():
    assert defaults()["lora_parameters"] == CONFIG_DEFAULTS["lora_parameters"]
    defaults()["lora_parameters"]["rank"] = 1
    assert defaults()["lora_parameters"]["rank"] == 8


@pytest.mark.parametrize("text", ["6GB", "800MB", "800000000", "1.5g", "2 M", "12 gb ", "1."])
def test_sizes_are_read_as_mlx_lm_reads_them(text):
    assert parse_size(text) == _parse_size(text)


@pytest.mark.parametrize("text", ["", "GB", "6KB", "-6GB", "1.2.3", "6GBB", "0", "0.1", "x", "..M"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size such as 6GB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["True", "T", "False", "f", "FALSE", "no", ""])
def test_true_and_false_are_read_as_mlx_lm_reads_them(text):
    assert parse_bool(text) == str2bool(text)
