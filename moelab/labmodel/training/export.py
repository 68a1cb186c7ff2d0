"""Weights from training to a folder that plain `mlx_lm.load` reads.

Two folders are made: one in float32 with `transformers`' parameter names (what
parity is measured on), and the shipped one, made from it by `mlx_lm.convert`
at 4 bits. Scales and activations stay float32, because MLX's CPU kernels are
many times slower in half precision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.labmodel.training.settings import Architecture

#: Sampling that suits a model of this size: cautious, few tails.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_float_folder(
    state: dict[str, Tensor], architecture: Architecture, tokenizer: Path, out: Path
) -> None:
    """Write config, float32 weights and tokenizer in the Hugging Face layout.

    Args:
        state: The model's state dict.
        architecture: Its sizes.
        tokenizer: Folder of the tokenizer files.
        out: Folder to write.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    ids = _special_ids(tokenizer)
    config = {
        **architecture.config(),
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": None,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": config["eos_token_id"], **SAMPLING}, indent=2) + "\n"
    )
    tensors = {name: part for key, w in state.items() for name, part in _unstack(key, w)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer / name, out / name)


def quantise_folder(source: Path, out: Path, *, bits: int = 4, group: int = 64) -> None:
    """Run `mlx_lm.convert` on a float folder, and tidy what it wrote.

    Args:
        source: What `write_float_folder` made.
        out: Folder to write; replaced if it is there.
        bits: Bits a weight.
        group: Weights that share a scale.
    """
    from mlx_lm import convert

    if out.exists():
        shutil.rmtree(out)
    convert(str(source), str(out), quantize=True, q_bits=bits, q_group_size=group, dtype="float32")
    for path in out.iterdir():
        if path.name not in {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            *_TOKENIZER_FILES,
        }:
            path.unlink()
    for name in (*_TOKENIZER_FILES, "generation_config.json"):
        shutil.copy(source / name, out / name)


def _unstack(key: str, weight: Tensor) -> list[tuple[str, Any]]:
    """Split stacked experts into one tensor each, which mlx-lm's loader expects."""
    weight = weight.detach().float().cpu().contiguous()
    if key.endswith("experts.gate_up_proj"):
        base = key.removesuffix("gate_up_proj")
        return [
            (f"{base}{e}.{name}.weight", part.contiguous().clone())
            for e, both in enumerate(weight)
            for name, part in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)
        ]
    if key.endswith("experts.down_proj"):
        base = key.removesuffix("down_proj")
        return [(f"{base}{e}.down_proj.weight", w.clone()) for e, w in enumerate(weight)]
    return [(key, weight)]


def _special_ids(tokenizer: Path) -> dict[str, int]:
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}
