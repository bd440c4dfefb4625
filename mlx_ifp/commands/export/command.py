"""``mlx_ifp.export`` writes a task's sub-network as a stock mlx-lm directory or as GGUF."""

import argparse
import sys

from mlx_lm.utils import upload_to_hub

from ...checkpoint.directory import Checkpoint, open_checkpoint
from ...checkpoint.hub import uploading
from ...checkpoint.locate import resolve
from ...checkpoint.tokenizers import load_tokenizer_of
from ...cli.arguments import check_given, given_selection, load_model, task_of
from ...errors import IFPError
from ...selection.files import save_selection
from ...selection.selection import Selection
from .stock_model import export


def _selection(args: argparse.Namespace, checkpoint: Checkpoint) -> Selection | None:
    """The selection that the options name; None for the dense model."""
    task = task_of(args)
    named = [task is not None, args.selection is not None, args.task_name is not None, args.dense]
    if args.task_from is not None or sum(named) != 1:
        raise IFPError("Name one of --task, --task-file, --task-name, --selection and --dense.")
    if args.dense:
        return None
    if task is None:
        return given_selection(args, checkpoint)
    model, _ = load_model(args)
    return model.select(task)


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.export``."""
    check_given(args)
    checkpoint = open_checkpoint(resolve(args.model, args.revision))
    selection = _selection(args, checkpoint)
    tokenizer = load_tokenizer_of(checkpoint, {"trust_remote_code": args.trust_remote_code})
    notes = export(
        checkpoint,
        tokenizer,
        args.save_path,
        selection,
        dequantize=args.dequantize,
        gguf=args.gguf,
    )
    # --dense has no selection and cannot be combined with this flag.
    if args.save_selection is not None and selection is not None:
        save_selection(args.save_selection, selection)
    for note in notes:
        print(f"[INFO] {note}", file=sys.stderr)
    k = checkpoint.d_ffn if selection is None else selection.k
    print(f"{args.save_path}: {checkpoint.config['model_type']}, intermediate_size {k}")
    if args.upload_repo is not None:
        with uploading(args.save_path, args.upload_repo):
            upload_to_hub(args.save_path, args.upload_repo)
