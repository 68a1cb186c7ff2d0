"""Tiny random checkpoints of the mlx-lm families, and ways to damage them.

`build` writes a folder that plain `mlx_lm.load` accepts: the family's own model
class with seeded random weights, quantised as mlx-lm quantises, with a real byte-level
tokenizer. Weights come from numpy, drawn by name, so that a seed means the same model
in every layout, quantisation and number of shards.

`broken` writes a checkpoint with one thing wrong, for the tests of bad input.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from moelab.check.families import build as building
from moelab.check.families.build import QUANT, SPECIAL, DType, prompt
from moelab.check.families.configs import COMMON, VOCAB, config_of

__all__ = ["QUANT", "SPECIAL", "VOCAB", "DType", "broken", "build", "prompt"]

Layout = Literal["stacked", "per_expert"]

FAMILIES: dict[str, dict[str, Any]] = {
    family: config_of(family)
    for family in (
        "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "mixtral", "deepseek_v3", "gpt_oss",
    )
}  # fmt: skip
"""A tiny configuration for each of the families that most tests run.

Capacities top-k, E/4, E/2 and E are all distinct, except for mixtral, whose E/4 is its
top-k. qwen3_moe's layer 1 and deepseek_v3's layer 0 are dense.
"""

DENSE: dict[str, Any] = {
    **COMMON,
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "intermediate_size": 128,
}
"""A model without experts."""

PER_EXPERT: dict[str, tuple[str, ...]] = {
    "qwen2_moe": ("weight", "scales", "biases"),
    "qwen3_moe": ("weight",),
    "qwen3_next": ("weight",),
    "olmoe": ("weight", "scales", "biases"),
    "mixtral": ("weight", "scales", "biases"),
    "deepseek_v3": ("weight", "scales", "biases"),
}
"""The tensors of one expert that each family's `sanitize` stacks: with `weight` alone a
quantised per-expert checkpoint cannot be loaded by mlx-lm."""

_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_NORM_PLUS_ONE = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def experts(family: str) -> tuple[int, int]:
    """Numbers of routed experts a layer and of experts a token for a tiny family."""
    config = FAMILIES[family]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(config[n] for n in names if n in config), config["num_experts_per_tok"]


def moe_layers(family: str) -> list[int]:
    """Indices of the layers of a tiny family that have experts."""
    config = FAMILIES[family]
    dense = set(config.get("mlp_only_layers", []))
    first = config.get("first_k_dense_replace", 0)
    return [i for i in range(config["num_hidden_layers"]) if i >= first and i not in dense]


def capacities(family: str) -> list[int]:
    """The capacities to test, ascending and without repeats: top-k, E/4, E/2 and E."""
    number, top_k = experts(family)
    return sorted({top_k, max(top_k, number // 4), number // 2, number})


def build(
    folder: Path,
    family: str,
    *,
    quant: dict[str, Any] | None = QUANT,
    dtype: DType = "float32",
    seed: int = 0,
    layout: Layout = "stacked",
    shards: int = 1,
    chat_template: bool = False,
    generation_config: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny random checkpoint.

    Args:
        folder: Where to write it; created when absent.
        family: A key of `FAMILIES`, or "dense" for a model without experts.
        quant: `group_size`, `bits` and optionally `mode` ("affine", "mxfp4", "mxfp8",
            "nvfp4"), completed from the mode's defaults; None leaves it unquantised.
        dtype: Type of the floating tensors, quantisation scales included.
        seed: Chooses the weights, the same ones for every layout and sharding.
        layout: "stacked" writes the names of mlx-lm's modules, "per_expert" one tensor
            an expert, as published checkpoints have them.
        shards: Number of safetensors files.
        chat_template: Whether the tokenizer has one.
        generation_config: Contents of generation_config.json; None writes no such file.
        overrides: Entries of config.json that replace the family's.

    Returns:
        `folder`.

    Raises:
        ValueError: If mlx-lm could not load the layout that was asked for.
    """
    stacks = PER_EXPERT.get(family, ())
    if layout == "per_expert" and not stacks:
        raise ValueError(f"mlx-lm's {family} has no per-expert layout")
    if layout == "per_expert" and quant is not None and "scales" not in stacks:
        raise ValueError(f"mlx-lm's {family} stacks no scales: per_expert needs quant=None")

    base = DENSE if family == "dense" else FAMILIES[family]
    return building.build(
        folder,
        {**base, **(overrides or {})},
        quant=quant,
        dtype=dtype,
        seed=seed,
        arrange=_per_expert if layout == "per_expert" else None,
        shards=shards,
        chat_template=chat_template,
        generation_config=generation_config,
    )


def _per_expert(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Undo what the family's `sanitize` does to a checkpoint with one tensor an expert."""
    family = config["model_type"]
    out: dict[str, mx.array] = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.(\w+)", name)
        if found:
            block, projection, kind = found.groups()
            if family == "mixtral":
                projection = _MIXTRAL_NAMES[projection]
            for expert in range(value.shape[0]):
                out[f"{block}.experts.{expert}.{projection}.{kind}"] = value[expert]
        elif family == "qwen3_next" and name.endswith(_NORM_PLUS_ONE):
            out[name] = value - 1
        elif family == "qwen3_next" and name.endswith("conv1d.weight"):
            out[name] = value.moveaxis(1, 2)
        else:
            out[name] = value
    if family == "deepseek_v3" and "quantization" not in config:
        _join_kv_b(out, config)
    return out


def _join_kv_b(weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Replace embed_q and unembed_out by the kv_b_proj that published checkpoints have."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        keys = weights.pop(f"{prefix}.embed_q.weight").swapaxes(-1, -2)
        values = weights.pop(f"{prefix}.unembed_out.weight")
        both = mx.concatenate([keys, values], axis=1)
        weights[f"{prefix}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])


# Damage. Each function changes a good checkpoint in place.


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


def write_header(file: Path, header: dict[str, Any]) -> None:
    """Replace the header of a safetensors file and leave its data alone."""
    _, start = read_header(file)
    data = file.read_bytes()[start:]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    return sorted(folder.glob("model*.safetensors"))


def _expert_tensor(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """A shard, its header, and an expert's weight in it."""
    for file in shard_files(folder):
        header, _ = read_header(file)
        for name in header:
            if re.search(r"(switch_mlp|experts)\..*weight$", name) and "shared" not in name:
                return file, header, name
    raise ValueError(f"no expert tensor in {folder}")


def _missing_shard(folder: Path) -> None:
    files = shard_files(folder)
    if len(files) < 2:
        raise ValueError("a checkpoint that misses a shard needs at least 2 of them")
    files[-1].unlink()


def _truncated_shard(folder: Path) -> None:
    file = shard_files(folder)[-1]
    _, start = read_header(file)
    os.truncate(file, start + (file.stat().st_size - start) * 2 // 3)


def _empty_shard(folder: Path) -> None:
    os.truncate(shard_files(folder)[-1], 0)


def _header_too_long(folder: Path) -> None:
    file = shard_files(folder)[0]
    data = file.read_bytes()
    file.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])


def _header_not_json(folder: Path) -> None:
    file = shard_files(folder)[0]
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"?" + data[9:])


def _offsets_beyond(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    size = file.stat().st_size
    header[name]["data_offsets"] = [o + size for o in header[name]["data_offsets"]]
    write_header(file, header)


def _offsets_overlap(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    same = [
        n
        for n, entry in header.items()
        if n not in (name, "__metadata__")
        and (entry["shape"], entry["dtype"]) == (header[name]["shape"], header[name]["dtype"])
    ]
    header[name]["data_offsets"] = header[same[0]]["data_offsets"]
    write_header(file, header)


def _offsets_size(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin, end - 4]
    write_header(file, header)


def _missing_tensor(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    del header[name]
    write_header(file, header)


def _missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    for file in shard_files(folder):
        file.unlink()


BROKEN: dict[str, Callable[[Path], None]] = {
    "missing_shard": _missing_shard,
    "truncated_shard": _truncated_shard,
    "empty_shard": _empty_shard,
    "header_too_long": _header_too_long,
    "header_not_json": _header_not_json,
    "offsets_beyond": _offsets_beyond,
    "offsets_overlap": _offsets_overlap,
    "offsets_size": _offsets_size,
    "missing_tensor": _missing_tensor,
    "missing_config": _missing_config,
    "no_weights": _no_weights,
}
"""What can be wrong with a checkpoint: each function damages a folder in place."""


def broken(folder: Path, kind: str, family: str = "qwen2_moe", **options: Any) -> Path:
    """Build a checkpoint of 2 shards with one thing wrong.

    Args:
        folder: Where to write it.
        kind: A key of `BROKEN`.
        family: A key of `FAMILIES`.
        options: Passed to `build`.

    Returns:
        `folder`.
    """
    build(folder, family, **{"shards": 2, **options})
    BROKEN[kind](folder)
    return folder
