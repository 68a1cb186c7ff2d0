"""Checkpoints as they are published: what mlx-lm's `sanitize` makes its own names of.

With one tensor an expert, which is stacked; or with gate and up in one tensor, which is cut.
"""

from __future__ import annotations

import re

import mlx.core as mx

from moelab.check.families.build import Weights
from moelab.check.families.configs import Config

_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_SAME = {name: name for name in _W}

SWITCHES: dict[str, tuple[str, str, dict[str, str]]] = {
    **dict.fromkeys(
        (
            "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "bailing_moe_v3", "deepseek",
            "deepseek_v2", "deepseek_v32", "ernie4_5_moe", "exaone_moe", "glm4_moe",
            "glm4_moe_lite", "glm_moe_dsa", "hunyuan", "jamba", "kimi_k25", "kimi_vl", "laguna",
            "longcat_flash", "longcat_flash_ngram", "mellum", "mimo_v2_flash", "mistral4",
            "solar_open",
        ),
        (".switch_mlp", ".experts", _SAME),
    ),
    **dict.fromkeys(("afmoe", "dots1", "Klear"), (".experts", ".experts", _SAME)),
    **dict.fromkeys(
        ("lfm2_moe", "minimax", "minimax_m3_vl", "phimoe"), (".switch_mlp", ".experts", _W)
    ),
    "kimi_linear": (".mlp.switch_mlp", ".block_sparse_moe.experts", _W),
    "nemotron_h": (".switch_mlp", ".experts", {"fc1": "up_proj", "fc2": "down_proj"}),
    "phixtral": (".switch_mlp", ".mlp", {"fc1": "fc1", "fc2": "fc2"}),
}  # fmt: skip
"""For each family: a switch's name, the name before an expert's number on disk, and what the
projections are called there."""


def per_expert(family: str, weights: Weights, config: Config) -> Weights:
    """Undoes the stacking.

    Args:
        family: A key of `SWITCHES`.
        weights: By the names of mlx-lm's modules.
        config: Not looked at.

    Returns:
        The same, with a tensor for each expert.
    """
    switch, experts, names = SWITCHES[family]
    pattern = re.compile(rf"(.*){re.escape(switch)}\.({'|'.join(names)})\.(\w+)")
    out: Weights = {}
    for name, value in weights.items():
        found = pattern.fullmatch(name)
        if found is None:
            out[name] = value
            continue
        block, projection, kind = found.groups()
        for expert in range(value.shape[0]):
            out[f"{block}{experts}.{expert}.{names[projection]}.{kind}"] = value[expert]
    return out


FUSED: dict[str, tuple[str, str, str, bool]] = {
    "llama4": (".experts", ".experts.gate_up_proj", ".experts.down_proj", True),
    "qwen3_5_moe": (".switch_mlp", ".experts.gate_up_proj", ".experts.down_proj", False),
    "mistral4": (".switch_mlp", ".experts.gate_up_proj", ".experts.down_proj", False),
    "gemma4_text": (".switch_glu", ".gate_up_proj", ".down_proj", False),
    "granitemoehybrid": (
        ".switch_mlp", ".input_linear.weight", ".output_linear.weight", False,
    ),
}  # fmt: skip
"""For each family: a switch's name, what takes its place with gate and up, one above the other,
and with down; and whether all are transposed."""


def fused(family: str, weights: Weights, config: Config) -> Weights:
    """Undoes the cutting.

    Args:
        family: A key of `FUSED`.
        weights: By the names of mlx-lm's modules; unquantised.
        config: Not looked at.

    Returns:
        The same, with gate and up of all experts in one tensor.
    """
    switch, gate_up, down, transposed = FUSED[family]
    pattern = re.compile(rf"(.*){re.escape(switch)}\.(gate|up|down)_proj\.weight")

    def laid(value: mx.array) -> mx.array:
        return value.swapaxes(-1, -2) if transposed else value

    out: Weights = {}
    for name, value in weights.items():
        found = pattern.fullmatch(name)
        if found is None:
            out[name] = value
        elif found[2] == "down":
            out[found[1] + down] = laid(value)
        elif found[2] == "gate":
            up = weights[name.replace("gate_proj", "up_proj")]
            out[found[1] + gate_up] = laid(mx.concatenate([value, up], axis=-2))
    return out
