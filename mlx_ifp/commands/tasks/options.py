"""The command line of ``mlx_ifp.tasks``."""

import argparse

from ...cli.flags import add_checkpoint_options, add_model_options, new_parser, parse_count

EXAMPLES = """examples:
  mlx_ifp.tasks add python --model smollm2-ifp --task "You are an expert Python programmer."
  mlx_ifp.generate --model smollm2-ifp --task-name python --prompt "Sort a list."
  mlx_ifp.tasks add letters --model smollm2-ifp --examples letters.jsonl
  mlx_ifp.tasks list --model smollm2-ifp
  mlx_ifp.tasks export python python.safetensors --model smollm2-ifp
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.tasks``: one parser an action."""
    parser = new_parser("tasks", "Keep selections under names, for each checkpoint.", EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=f"{text}.")

    add = action("add", "Select by a description of a task, and keep the selection")
    add.add_argument("name", metavar="NAME")
    text = add.add_mutually_exclusive_group()
    text.add_argument(
        "--task",
        metavar="TEXT",
        help="A description of the task, which selects; with --examples it is only kept",
    )
    text.add_argument("--task-file", metavar="FILE", help="A file with such a description")
    add.add_argument(
        "--examples",
        metavar="FILE",
        help="Examples of the task, 8 to 64 rows of jsonl as for training, which select: messages, "
        "or prompt and completion. The dense model writes answers that are missing",
    )
    add.add_argument(
        "--max-tokens",
        "-m",
        type=parse_count,
        default=128,
        help="Tokens of an answer that the dense model writes (default: 128)",
    )
    add.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="Keep as few channels as lose no more on --prompts: the KL of a token to the dense "
        "model",
    )
    add.add_argument(
        "--prompts", metavar="FILE", help="Prompts of the task, as for mlx_ifp.evaluate"
    )
    add.add_argument("--force", action="store_true", help="Replace a task of this name")
    add_model_options(add)

    add_checkpoint_options(action("list", "List the tasks, and how much they overlap"))

    show = action("show", "Show a task")
    show.add_argument("name", metavar="NAME")
    add_checkpoint_options(show)

    rm = action("rm", "Delete a task")
    rm.add_argument("name", metavar="NAME")
    add_checkpoint_options(rm)

    export = action("export", "Write a task to a file, for a machine that holds the checkpoint")
    export.add_argument("name", metavar="NAME")
    export.add_argument("file", metavar="FILE")
    export.add_argument("--force", action="store_true", help="Replace the file if it exists")
    add_checkpoint_options(export)

    read = action("import", "Take a task from a file of export")
    read.add_argument("file", metavar="FILE")
    read.add_argument("name", metavar="NAME", nargs="?", help="Its name here (default: as it has)")
    read.add_argument("--force", action="store_true", help="Replace a task of this name")
    add_checkpoint_options(read)
    return parser
