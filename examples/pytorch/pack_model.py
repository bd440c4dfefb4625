"""A trained checkpoint in small files, to be carried over a narrow line, and back.

    python pack_model.py runs/prompt packed --q-bits 4 --q-group-size 64
    python pack_model.py --unpack packed checkpoint

A checkpoint that was trained with rounded weights means nothing more than what ``mlx_ifp.convert
-q`` makes of it. So the LLM's matrices are packed as what quantization reads of them: the codes and
the two ends of each group. The checkpoint that is unpacked quantizes to the same codes, scales and
biases. The predictor stays as it is, and an embedding that it shares with the LLM is stored once.
Embeddings and matrices whose rows are no multiples of the group size stay as they are, too.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from output import new_directory
from rounding import BITS, pack, unpack
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from save import MANIFEST, PREDICTOR, STATIC
from torch import Tensor

PACKING = "packing.json"
_INDEX = "model.safetensors.index.json"
# Files of the predictor and of the LLM, by what their tensors' names begin with here.
_LLM, _PREDICTOR = "llm:", "predictor:"
_SHARED = "extractor.embed_tokens.weight"


def fail(text: object) -> SystemExit:
    return SystemExit(f"pack_model.py: {text}")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 of any shape, as a stream of ``bits`` bits each: uint8 [n]."""
    flat = codes.flatten()
    if bits == 8:
        return flat.clone()
    if bits == 4:
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
        return flat[0::2] | (flat[1::2] << 4)
    shifts = torch.arange(bits, dtype=torch.uint8)
    # Eight codes fill ``bits`` bytes.
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])
    stream = ((flat[:, None] >> shifts) & 1).flatten().view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes of :func:`pack_codes`, uint8 [count]."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count]
    stream = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    codes = stream.view(-1, bits) << torch.arange(bits, dtype=torch.uint8)
    return codes.sum(dim=1).to(torch.uint8)[:count]


def is_quantized(name: str, tensor: Tensor, group_size: int) -> bool:
    """Whether ``convert -q`` rounds a tensor of the LLM: matrices of whole groups."""
    rows = tensor.shape[0 if name.endswith("down_proj.weight") else -1] if tensor.ndim == 2 else 1
    return tensor.ndim == 2 and rows % group_size == 0


def read_llm(directory: Path) -> dict[str, Tensor]:
    """All tensors of the LLM's files."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise fail(f"{directory} has no model.safetensors; give a trained checkpoint.")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise fail(f"{directory} cannot be read ({error}).") from error


def pack_checkpoint(
    source: Path, output: Path, bits: int, group_size: int, file_bytes: int = 16_000_000
) -> list[Path]:
    """Write a checkpoint of the layout "manifest" in files of about ``file_bytes`` at most."""
    if not (source / MANIFEST).is_file():
        raise fail(f"{source} is no trained checkpoint, it has no {MANIFEST}.")
    manifest = json.loads((source / MANIFEST).read_text())
    if (manifest.get("quantization") or {}).get("bits_of"):
        raise fail(
            f"{source} was trained with --q-bits-of, and all weights are packed in the same bits; "
            "carry it as it is."
        )
    llm = read_llm(source)
    shapes: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in llm.items():
        if not is_quantized(name, tensor, group_size):
            tensors[_LLM + name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        rows = tensor.T.contiguous() if name.endswith("down_proj.weight") else tensor
        codes, low, high = pack(rows, bits, group_size)
        tensors[f"{_LLM}{name}:codes"] = pack_codes(codes, bits)
        tensors[f"{_LLM}{name}:low"], tensors[f"{_LLM}{name}:high"] = low, high
    shared = None
    for file in (PREDICTOR, STATIC):
        for name, tensor in load_file(source / file).items() if (source / file).is_file() else ():
            same = [n for n, t in llm.items() if name == _SHARED and torch.equal(t, tensor)]
            if same:
                shared = same[0]
            else:
                tensors[f"{_PREDICTOR}{file}:{name}"] = tensor
    packing = {"bits": bits, "group_size": group_size, "shapes": shapes, "shared": shared}
    with new_directory(output) as directory:
        for path in sorted(source.iterdir()):
            if path.is_dir() and path.name.startswith("predictor_"):
                shutil.copytree(path, directory / path.name)
            elif path.is_file() and path.suffix in (".json", ".jinja") and path.name != _INDEX:
                shutil.copy(path, directory)
        # A tokenizer of some MB that is there twice is stored once.
        packing["same_tokenizer"] = _drop_copies(directory)
        # The largest first, each into the first file that has room.
        bins: list[dict[str, Tensor]] = []
        sizes: list[int] = []
        for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
            size = tensors[name].nbytes + 200
            place = next((i for i, n in enumerate(sizes) if n + size <= file_bytes), len(bins))
            if place == len(bins):
                bins.append({})
                sizes.append(0)
            bins[place][name] = tensors[name].contiguous()
            sizes[place] += size
        packing["files"] = len(bins)
        (directory / PACKING).write_text(json.dumps(packing))
        for i, part in enumerate(bins):
            save_file(part, directory / f"packed-{i:02}.safetensors")
    return sorted(output.rglob("*"))


def _drop_copies(directory: Path) -> list[str]:
    """Delete files of predictor_tokenizer/ that are beside it, too; their names."""
    names = []
    for path in sorted((directory / "predictor_tokenizer").glob("*")):
        twin = directory / path.name
        if twin.is_file() and twin.read_bytes() == path.read_bytes():
            path.unlink()
            names.append(path.name)
    return names


def unpack_checkpoint(source: Path, output: Path) -> None:
    """Write the checkpoint of the layout "manifest" that was packed."""
    try:
        packing = json.loads((source / PACKING).read_text())
        files = sorted(source.glob("packed-*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if len(files) != packing["files"]:
            raise ValueError(f"{len(files)} of {packing['files']} files packed-*.safetensors")
        llm: dict[str, Tensor] = {}
        others: dict[str, dict[str, Tensor]] = {}
        bits, group_size = packing["bits"], packing["group_size"]
        for name, shape in packing["shapes"].items():
            codes, low, high = (
                tensors.pop(f"{_LLM}{name}:{part}") for part in ("codes", "low", "high")
            )
            turned = name.endswith("down_proj.weight")
            shape = shape[::-1] if turned else shape
            codes = unpack_codes(codes, bits, shape[0] * shape[1])
            weight = unpack(codes.view(shape[0], -1, group_size), low, high, bits)
            llm[name] = (weight.T if turned else weight).contiguous()
        for name, tensor in tensors.items():
            if name.startswith(_LLM):
                llm[name.removeprefix(_LLM)] = tensor
            else:
                file, _, own = name.removeprefix(_PREDICTOR).partition(":")
                others.setdefault(file, {})[own] = tensor
        if packing["shared"]:
            others[PREDICTOR][_SHARED] = llm[packing["shared"]].clone()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise fail(
            f"{source} is not what this script packed, or a part is missing ({reason})."
        ) from error
    with new_directory(output) as directory:
        for path in sorted(source.iterdir()):
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            elif path.suffix in (".json", ".jinja") and path.name != PACKING:
                shutil.copy(path, directory)
        for name in packing["same_tokenizer"]:
            shutil.copy(directory / name, directory / "predictor_tokenizer" / name)
        save_file(llm, directory / "model.safetensors", metadata={"format": "pt"})
        for file, parts in others.items():
            save_file(parts, directory / file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="a directory that is not there yet")
    parser.add_argument(
        "--unpack", action="store_true", help="make a checkpoint of what was packed"
    )
    parser.add_argument("--q-bits", type=int, choices=BITS, default=4)
    parser.add_argument("--q-group-size", type=int, choices=[32, 64, 128], default=64)
    parser.add_argument("--file-bytes", type=int, default=16_000_000, help="of a file at most")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise fail(f"{args.output} exists; name a new directory or remove it.")
    if args.unpack:
        unpack_checkpoint(args.source, args.output)
        print(f"{args.output}: the checkpoint of {args.source}")
        return
    paths = pack_checkpoint(
        args.source, args.output, args.q_bits, args.q_group_size, args.file_bytes
    )
    files = [path for path in paths if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f"{args.output}: {len(files)} files, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
