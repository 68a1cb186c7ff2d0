"""Router margins and lookahead recall, against each family's rule in plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest

import moelab
from moelab import labmodel, metrics
from moelab.errors import ClosedError, StudyError
from moelab.lab import Lab
from moelab.routing import scores
from moelab.routing.lookahead import lookahead_recall, router_margins
from tests.support import rules, stock, tiny

TOKENS = tiny.prompt(30)


def block_inputs(lab: Lab, tokens: list[int]) -> dict[int, np.ndarray]:
    """What each MoE block is given, (tokens, width), float64, while the text runs."""
    seen: dict[int, np.ndarray] = {}
    own = {site.layer: type(site.parent) for site in lab.sites}
    try:
        for site in lab.sites:

            def noting(self: Any, x: mx.array, layer: int = site.layer) -> Any:
                seen[layer] = np.array(x[0].astype(mx.float32)).astype(np.float64)
                return own[layer].__call__(self, x)

            site.parent.__class__ = type("Noting", (own[site.layer],), {"__call__": noting})
        mx.eval(lab.model(mx.array([tokens])))
    finally:
        for site in lab.sites:
            site.parent.__class__ = own[site.layer]
    return seen


def rule(lab: Lab, site: Any) -> rules.Rule:
    return rules.rule_of(lab.config["model_type"], site.parent, lab.config)


def margin_of(family: str, selection: np.ndarray, k: int) -> np.ndarray:
    ordered = -np.sort(-selection, axis=1)
    if family in ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe"):
        ordered = np.log(ordered)  # a difference of logits
    return ordered[:, k - 1] - ordered[:, k]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_margins(family: str) -> None:
    with moelab.load(stock.folder(family), tiny.capacities(family)[1]) as lab:
        classes = [type(module) for module in lab.model.modules()]
        found = router_margins(lab, TOKENS)
        assert [type(module) for module in lab.model.modules()] == classes
        inputs = block_inputs(lab, TOKENS)
        assert list(found.columns) == ["position", "layer", "margin", "scale"]
        assert len(found) == len(TOKENS) * len(lab.sites)
        assert (found.groupby("layer")["position"].apply(list).map(len) == len(TOKENS)).all()
        for site in lab.sites:
            expected = rule(lab, site).scores(inputs[site.layer]).selection
            own = found[found["layer"] == site.layer]
            np.testing.assert_allclose(
                own["margin"], margin_of(family, expected, site.top_k), atol=2e-4
            )
        softmax = family not in ("mixtral", "gpt_oss", "deepseek_v3")
        assert set(found["scale"]) == {"logit" if softmax else "score"}
        assert (found["margin"] >= 0).all() and found["margin"].max() > 0.01
        # In several chunks, going on from a cache.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scores, "CHUNK", 7)
            parts = router_margins(lab, TOKENS)
    pd.testing.assert_frame_equal(found, parts, check_exact=False, atol=1e-3)


def brute_recall(
    lab: Lab, inputs: dict[int, np.ndarray], m: int, ahead: int
) -> dict[int, list[float]]:
    """Of each token, at each layer that is foreseen."""
    found: dict[int, list[float]] = {}
    for here, there in zip(lab.sites, lab.sites[ahead:], strict=False):
        own = rule(lab, there)
        chosen = own.scores(inputs[there.layer]).selection
        guessed = own.scores(inputs[here.layer]).selection
        found[there.layer] = [
            len({*rules.top(c, there.top_k)} & {*rules.top(g, m)}) / there.top_k
            for c, g in zip(chosen, guessed, strict=True)
        ]
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recall(family: str) -> None:
    experts, k = tiny.experts(family)
    with moelab.load(stock.folder(family), tiny.capacities(family)[1]) as lab:
        inputs = block_inputs(lab, TOKENS)
        for ahead in range(1, len(lab.sites)):
            found = lookahead_recall(lab, TOKENS, m=(k, 2 * k, experts), ahead=ahead)
            assert len(found) == 3 * (len(lab.sites) - ahead)
            for row in found.itertuples():
                # Of experts scored alike (masked groups have 0) any may be guessed.
                tied = family == "deepseek_v3" and row.m > k
                expected = np.mean(brute_recall(lab, inputs, row.m, ahead)[row.layer])
                assert tied or row.recall == pytest.approx(expected, abs=1e-9)
                assert (row.domain, row.ahead, row.tokens) == ("all", ahead, len(TOKENS))
                assert row.chance == row.m / experts
            assert (found[found["m"] == experts]["recall"] == 1).all()


def test_the_lab_model() -> None:
    """Trained routers are foreseen far better than by chance; several texts, by domain."""
    texts = [
        {"text": text["text"][:220], "domain": domain}
        for domain in ("python", "spanish")
        for text in labmodel.texts(domain=domain, split="selection")[:2]
    ]
    with moelab.load("lab", 1.0) as lab:
        found = metrics.lookahead_recall(lab, texts)
        ids = {
            domain: [lab.tokenizer.encode(t["text"]) for t in texts if t["domain"] == domain]
            for domain in ("python", "spanish")
        }
        expected = {
            (domain, layer, m): values
            for domain, prompts in ids.items()
            for m in (6, 12, 24)
            for layer, values in _joined(lab, prompts, m).items()
        }
        margins = metrics.router_margins(lab, ids["python"][0])
        with lab.record() as recording:
            lab.generate(ids["python"][0], 1, template=False, temperature=0.0)
    assert set(found["m"]) == {6, 12, 24}
    assert set(found["layer"]) == set(range(1, 8))
    for row in found.itertuples():
        values = expected[row.domain, row.layer, row.m]
        assert row.tokens == len(values)
        assert row.recall == pytest.approx(np.mean(values), abs=2e-3)  # ties and rounding
    assert (found["recall"] > 2 * found["chance"]).all()
    # The margin is of the choices that a recording holds: normalised weights keep their order, and
    # the weakest one chosen was above the strongest that was not.
    assert (margins["margin"] > 0).mean() > 0.99
    assert len(margins) == recording.routing.query("phase == 'prefill' and rank == 0").shape[0]


def _joined(lab: Lab, prompts: list[list[int]], m: int) -> dict[int, list[float]]:
    parts = [brute_recall(lab, block_inputs(lab, ids), m, 1) for ids in prompts]
    return {layer: [v for part in parts for v in part[layer]] for layer in parts[0]}


def test_nothing_changes() -> None:
    """Output and recording are the same beside and after it."""
    with moelab.load(stock.folder("qwen3_next"), 8) as lab:
        before = lab.generate(TOKENS, 8, template=False, temperature=0.0)
        lookahead_recall(lab, TOKENS)
        router_margins(lab, TOKENS)
        assert lab.generate(TOKENS, 8, template=False, temperature=0.0) == before


def test_what_cannot_be_asked() -> None:
    with moelab.load(stock.folder("mixtral"), 2) as lab:
        asked: list[Callable[..., Any]] = [router_margins, lookahead_recall]
        for made in asked:
            for tokens in ([], [-1], [1.5]):
                with pytest.raises((StudyError, moelab.ProfileError)):
                    made(lab, tokens)
        with pytest.raises(StudyError, match=r"token ids from 0 on, at least one; got \[\]"):
            router_margins(lab, [])
        with pytest.raises(StudyError, match="ahead= must be between 1 and"):
            lookahead_recall(lab, TOKENS, ahead=len(lab.sites))
        for m in ((0,), (9,), (2.0,)):
            with pytest.raises(StudyError, match="m= are numbers of experts"):
                lookahead_recall(lab, TOKENS, m=m)  # type: ignore[arg-type]
        lab.on_miss = "drop"
        for made in asked:
            with pytest.raises(StudyError, match="under on_miss='drop' the lab is another model"):
                made(lab, TOKENS)
    with pytest.raises(ClosedError):
        router_margins(lab, TOKENS)


def test_a_family_that_does_not_show_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    with moelab.load(stock.folder("mixtral"), 2) as lab:
        monkeypatch.setattr("moelab.experts.router.SELECTS", "no such function")
        with pytest.raises(StudyError, match="MixtralSparseMoeBlock chooses its experts in a way"):
            router_margins(lab, TOKENS)
