"""Checkpoints as they are published, with one tensor an expert, of families that stack them.

mlx-lm's `sanitize` makes one tensor of them while it loads.
"""

from __future__ import annotations

import re

from moelab.check.families.build import Weights
from moelab.check.families.configs import Config

_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_SAME = {name: name for name in _W}

SWITCHES: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys(
        (
            "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "deepseek", "deepseek_v2",
            "deepseek_v32", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite",
            "glm_moe_dsa", "hunyuan", "jamba", "kimi_k25", "kimi_vl", "longcat_flash",
            "longcat_flash_ngram", "mellum", "mimo_v2_flash", "mistral4", "solar_open",
        ),
        (r"(.*)\.switch_mlp", _SAME),
    ),
    **dict.fromkeys(("afmoe", "dots1", "Klear"), (r"(.*)\.experts", _SAME)),
    **dict.fromkeys(("lfm2_moe", "minimax", "phimoe"), (r"(.*)\.switch_mlp", _W)),
    "nemotron_h": (r"(.*)\.switch_mlp", {"fc1": "up_proj", "fc2": "down_proj"}),
    "phixtral": (r"(.*)\.switch_mlp", {"fc1": "fc1", "fc2": "fc2"}),
}  # fmt: skip
"""For each family, the path of a switch, and what the projections are called on disk."""


def per_expert(family: str, weights: Weights, config: Config) -> Weights:
    """Undoes the stacking.

    Args:
        family: A key of `SWITCHES`.
        weights: By the names of mlx-lm's modules.
        config: Not looked at.

    Returns:
        The same, with a tensor for each expert.
    """
    switch, names = SWITCHES[family]
    pattern = re.compile(rf"{switch}\.({'|'.join(names)})\.(\w+)")
    folder = "mlp" if family == "phixtral" else "experts"
    out: Weights = {}
    for name, value in weights.items():
        found = pattern.fullmatch(name)
        if found is None:
            out[name] = value
            continue
        block, projection, kind = found.groups()
        for expert in range(value.shape[0]):
            out[f"{block}.{folder}.{expert}.{names[projection]}.{kind}"] = value[expert]
    return out
