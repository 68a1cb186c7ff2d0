"""Tiny checkpoints as their makers publish them, whose experts mlx-lm computes while it loads.

No byte range of these files holds an expert's tensor as the model uses it: it is half of another
tensor, every second row of one, or transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from moelab.check.families.build import random_model, write_tokenizer
from tests.support import tiny

_GRANITE: dict[str, Any] = {
    "model_type": "granitemoe", "vocab_size": tiny.VOCAB, "hidden_size": 64,
    "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "logits_scaling": 2.0,
    "attention_multiplier": 0.25, "embedding_multiplier": 1.5, "residual_multiplier": 0.5,
    "max_position_embeddings": 2048, "attention_bias": False, "rope_theta": 10000.0,
    "num_local_experts": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

Weights = dict[str, mx.array]


def gpt_oss(folder: Path) -> Path:
    """mxfp4 blocks in which gate and up rows alternate, everything else float32."""
    path, config, weights = _start(folder, tiny.FAMILIES["gpt_oss"])
    out: Weights = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(.*\.experts)\.(gate|up|down)_proj\.(weight|bias)", name)
        if not found:
            out[name] = value
        elif found[2] == "down":
            _blocks(out, f"{found[1]}.down_proj", found[3], value)
        elif found[2] == "gate":
            up = weights[name.replace("gate_proj", "up_proj")]
            both = mx.stack([value, up], axis=2).reshape(value.shape[0], -1, *value.shape[2:])
            _blocks(out, f"{found[1]}.gate_up_proj", found[3], both)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    return _finish(path, config, out)


def _blocks(out: Weights, name: str, kind: str, value: mx.array) -> None:
    if kind == "bias":
        out[f"{name}_bias"] = value
        return
    weight, scales, *_ = mx.quantize(value, mode="mxfp4")
    out[f"{name}_blocks"] = weight.view(mx.uint8).reshape(*scales.shape, -1)
    out[f"{name}_scales"] = scales


def granitemoe(folder: Path, dtype: tiny.DType = "float32") -> Path:
    """Gate and up in one tensor, one above the other."""
    path, config, weights = _start(folder, _GRANITE, dtype)
    out: Weights = {}
    for name, value in weights.items():
        if ".switch_mlp.down_proj" in name:
            out[name.replace("switch_mlp.down_proj", "output_linear")] = value
        elif ".switch_mlp.gate_proj" in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            joined = mx.concatenate([value, up], axis=1)
            out[name.replace("switch_mlp.gate_proj", "input_linear")] = joined
        elif ".switch_mlp." not in name:
            out[name] = value
    return _finish(path, config, out)


def qwen3_vl_moe(folder: Path) -> Path:
    """Gate and up side by side, and everything transposed."""
    text = tiny.FAMILIES["qwen3_moe"]
    path, _, weights = _start(folder, text)
    out: Weights = {}
    for name, value in weights.items():
        name = name.replace("model.", "model.language_model.", 1)
        if ".switch_mlp.down_proj" in name:
            out[name.replace("switch_mlp.down_proj.weight", "experts.down_proj")] = value.swapaxes(
                -1, -2
            )
        elif ".switch_mlp.gate_proj" in name:
            plain = name.replace("model.language_model.", "model.")
            up = weights[plain.replace("gate_proj", "up_proj")]
            out[name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")] = (
                mx.concatenate([value.swapaxes(-1, -2), up.swapaxes(-1, -2)], axis=-1)
            )
        elif ".switch_mlp." not in name:
            out[name] = value
    config = {"model_type": "qwen3_vl_moe", "text_config": text, "eos_token_id": 2}
    return _finish(path, config, out)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "qwen3_vl_moe": qwen3_vl_moe,
}


def _start(
    folder: Path, config: dict[str, Any], dtype: tiny.DType = "float32"
) -> tuple[Path, dict[str, Any], Weights]:
    """A folder with a tokenizer, the configuration, and the weights by mlx-lm's names."""
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, chat_template=False)
    weights = dict(tree_flatten(random_model(dict(config), dtype).parameters()))
    return folder, dict(config), weights


def _finish(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = {name: mx.contiguous(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), whole, metadata={"format": "mlx"})
    return folder
