"""The command line of ``mlx_ifp.manage``."""

import argparse

from ...cli.flags import new_parser

EXAMPLES = """examples:
  mlx_ifp.manage --scan
  mlx_ifp.manage --delete
  mlx_ifp.manage --delete --pattern smollm2
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.manage``, as far as they can be like those of mlx-lm."""
    parser = new_parser(
        "manage", "List and clear the selections and warm prompts kept on disk.", EXAMPLES
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--scan", action="store_true", help="List them")
    action.add_argument("--delete", action="store_true", help="Delete them")
    parser.add_argument("--pattern", default="", help="Only those whose model contains this")
    parser.add_argument("--cache-dir", help="Where selections are kept on disk")
    return parser
