"""What `ask_rules` finds out about every family, against what is written in mlx-lm's sources.

The table is written by hand from the sources of mlx-lm 0.32.2; nothing of it is computed.
"""

from __future__ import annotations

from typing import Any

import pytest

from moelab.check.families.build import random_model
from moelab.check.families.configs import CONFIGS, SEEDS, config_of
from moelab.experts.router import RouterRule, ask_rules
from moelab.families import find_switches
from tests.support import muse

FLAG = {
    "Klear": "norm_topk_prob",
    "afmoe": "route_norm",
    "bailing_hybrid": "norm_topk_prob",
    "bailing_moe": "norm_topk_prob",
    "bailing_moe_linear": "norm_topk_prob",
    "deepseek_v3": "norm_topk_prob",
    "deepseek_v32": "norm_topk_prob",
    "deepseek_v41": "norm_topk_prob",
    "dots1": "norm_topk_prob",
    "exaone_moe": "norm_topk_prob",
    "glm4_moe": "norm_topk_prob",
    "glm4_moe_lite": "norm_topk_prob",
    "glm_moe_dsa": "norm_topk_prob",
    "kimi_k25": "norm_topk_prob",
    "kimi_k3": "moe_renormalize",
    "kimi_linear": "moe_renormalize",
    "kimi_vl": "norm_topk_prob",
    "lfm2_moe": "norm_topk_prob",
    "longcat_flash": "norm_topk_prob",
    "longcat_flash_ngram": "norm_topk_prob",
    "mellum": "norm_topk_prob",
    "mimo_v2_flash": "norm_topk_prob",
    "mistral3": "norm_topk_prob",
    "mistral4": "norm_topk_prob",
    "nemotron_h": "norm_topk_prob",
    "olmoe": "norm_topk_prob",
    "prism_hadamard_qwen35": "norm_topk_prob",
    "qwen3_5": "norm_topk_prob",
    "qwen3_5_moe": "norm_topk_prob",
    "qwen3_moe": "norm_topk_prob",
    "qwen3_next": "norm_topk_prob",
    "qwen3_vl_moe": "norm_topk_prob",
    "solar_open": "norm_topk_prob",
    "step3p5": "norm_expert_weight",
}
"""The configuration's word for normalising, where a family leaves it to the configuration."""

ALWAYS = {
    "bailing_moe_v3", "ernie4_5_moe", "laguna", "minimax", "minimax_m3_vl",  # divide by the sum
    "gemma4", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba", "mixtral",
    "phixtral",  # softmax over the top k
}  # fmt: skip
NEVER = {"deepseek", "deepseek_v2", "hunyuan", "phimoe", "qwen2_moe"}
NOT_SEEN = {"llama4"}
"""It weighs the experts' input."""

NOT_BY_ONE = {
    "afmoe", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "deepseek_v3", "deepseek_v32",
    "deepseek_v41", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "kimi_k25",
    "kimi_k3", "kimi_linear", "kimi_vl", "mimo_v2_flash", "nemotron_h", "solar_open",
}  # fmt: skip
"""They normalise only if a token chooses more than one expert."""

IN_BLOCK = {
    "Klear", "afmoe", "ernie4_5_moe", "gpt_oss", "hunyuan", "jamba", "kimi_k3", "kimi_linear",
    "lfm2_moe", "llama4", "mellum", "minimax", "minimax_m3_vl", "mistral3", "mistral4", "mixtral",
    "olmoe", "phixtral", "prism_hadamard_qwen35", "qwen2_moe", "qwen3_5", "qwen3_5_moe",
    "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
}  # fmt: skip
"""The block's own code selects; in the others a router does, except `UNKNOWN`."""

UNKNOWN = {"phimoe"}
"""argmax twice, the second time without the first."""

NO_SWITCH = {"dbrx"}
NEEDS_METAL = {"muse_spark"}
RUNNABLE = sorted(set(CONFIGS) - NO_SWITCH - NEEDS_METAL)


def test_every_family_has_an_expectation() -> None:
    sets = [set(FLAG), ALWAYS, NEVER, NOT_SEEN, NO_SWITCH, NEEDS_METAL]
    assert sorted(CONFIGS) == sorted(family for one in sets for family in one)


def rules(family: str, **settings: Any) -> list[RouterRule]:
    config = config_of(family)
    config.get("text_config", config).update(settings)
    model = random_model(config, seed=SEEDS.get(family, 0))
    sites = find_switches(model, family)
    before = [(type(m), id(m)) for m in model.modules()]
    found = ask_rules(model, sites)
    assert [(type(m), id(m)) for m in model.modules()] == before, "the model is left as it was"
    assert all(site.parent[site.key] is site.switch for site in sites)
    assert set(found) == {site.layer for site in sites}
    return list(found.values())


@pytest.mark.parametrize("family", RUNNABLE)
def test_the_rule(family: str) -> None:
    kind = "block" if family in IN_BLOCK else "unknown" if family in UNKNOWN else "router"
    flags: list[bool | None] = [True, False] if family in FLAG else [None]
    for flag in flags:
        settings = {} if flag is None else {FLAG[family]: flag}
        wanted = family in ALWAYS if flag is None else flag
        for rule in rules(family, **settings):
            assert rule.unit.kind == kind
            assert rule.normalises is (None if family in NOT_SEEN else wanted), settings
            assert rule.shows == (family not in NOT_SEEN)
            assert (rule.unit.expert_scale is not None) == family.startswith("gemma4")


@pytest.mark.parametrize("family", sorted(NOT_BY_ONE))
def test_one_expert_a_token(family: str) -> None:
    own_word = family in ("kimi_k3", "kimi_linear")
    word = "num_experts_per_token" if own_word else "num_experts_per_tok"
    for rule in rules(family, **{word: 1, FLAG[family]: True}):
        assert rule.normalises is False


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gemma4_text", "afmoe"])
def test_sixteen_bits(family: str) -> None:
    config = config_of(family)
    model = random_model(config, "bfloat16")
    for rule in ask_rules(model, find_switches(model, family)).values():
        assert rule.normalises is True
    config[FLAG.get(family, "")] = False
    model = random_model(config, "bfloat16")
    for rule in ask_rules(model, find_switches(model, family)).values():
        assert rule.normalises is (family not in FLAG)


def test_muse_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels normalise where nobody sees it."""
    from mlx_lm.models import muse_spark

    for kernel in muse.KERNELS:
        monkeypatch.setattr(muse_spark, kernel.__name__, kernel)
    for rule in rules("muse_spark"):
        assert (rule.unit.kind, rule.normalises, rule.shows) == ("unknown", None, False)
