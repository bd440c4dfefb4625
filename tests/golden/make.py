"""Makes the checkpoints of this folder, and what PyTorch computes with them.

Needs PyTorch: python -m tests.golden.make
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import torch_reference as ref
from ..conftest import tiny_tokenizer

FOLDER = Path(__file__).parent
K = 31
PROMPTS = [[5, 77, 130, 9, 42, 200, 301, 17], [300], list(range(3, 370, 7))]


def save_expected(path: Path, llm, predictor, soft: bool) -> None:
    """For each prompt: tokens, scores and mask [L, F], logits of the LLM masked and dense."""
    tensors = {}
    for i, scores in enumerate(ref.scores_of(predictor, PROMPTS)):
        mask = ref.make_mask(scores, K, soft)
        tensors[f"{i}.tokens"] = torch.tensor(PROMPTS[i], dtype=torch.int32)
        tensors[f"{i}.scores"] = scores.contiguous()
        tensors[f"{i}.mask"] = mask.contiguous()
        tensors[f"{i}.masked"] = ref.logits_of(llm, PROMPTS[i], mask)
        tensors[f"{i}.dense"] = ref.logits_of(llm, PROMPTS[i])
    save_file(tensors, path)


def as_safetensors(file: Path) -> None:
    """The ordinary tests have no PyTorch to read a pickle with."""
    tensors = torch.load(file, weights_only=True)
    ref.save_tensors(tensors, file.with_suffix(".safetensors"))
    file.unlink()


def main() -> None:
    """Write everything anew."""
    for name in ("split", "module", "manifest", "backbone", "tokenizer"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    tiny_tokenizer().save_pretrained(FOLDER / "tokenizer")

    llm = ref.make_llm("qwen2", tie_word_embeddings=True)
    predictor = ref.predictor_for(llm, "split")
    ref.save_split(FOLDER / "split", llm, predictor, K, "soft")
    as_safetensors(FOLDER / "split" / "extractor.pt")
    as_safetensors(FOLDER / "split" / "mask_head.pt")
    save_expected(FOLDER / "split" / "expected.safetensors", llm, predictor, soft=True)

    module, predictor = ref.module_of(ref.make_llm("llama"), tied=True)
    (FOLDER / "module").mkdir()
    ref.save_tensors(module.state_dict(), FOLDER / "module" / "model.safetensors")
    for name, part in (
        ("llm", module.llm),
        ("backbone", module.sparsity_predictor.feature_extractor),
    ):
        (FOLDER / "module" / f"{name}.json").write_text(part.config.to_json_string())
    save_expected(FOLDER / "module" / "expected.safetensors", module.llm, predictor, soft=False)

    llm = ref.make_llm("gemma3")
    predictor = ref.predictor_for(llm, "manifest", "qwen3")
    run = FOLDER / "manifest"
    ref.save_manifest(run, llm, predictor, K)
    (FOLDER / "manifest-backbone").rename(FOLDER / "backbone")
    manifest = json.loads((run / "ifpruning_config.json").read_text())
    manifest["predictor_model"] = "/trained/elsewhere"
    (run / "ifpruning_config.json").write_text(json.dumps(manifest, indent=2))
    save_expected(run / "expected.safetensors", llm, predictor, soft=False)


if __name__ == "__main__":
    main()
