"""Texts of the full and the constrained model from the same prompt, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab.errors import MoelabError, StudyError
from moelab.lab import Lab
from moelab.quality import pairs as pairing
from moelab.quality.generation import compare_generation
from moelab.quality.pairs import Ask, Beginning, Written, first_fork, paired_means, pairs
from moelab.quality.repetition import seq_rep_n
from tests.support import stock, tiny

PROMPTS = [
    {"text": "The bank holds some experts, and others are on disk.", "id": "a", "domain": "x"},
    {"text": "A router chooses a few of many for every token.", "id": "b", "domain": "x"},
    {"text": "def route(token):\n    return top(token)", "id": "c", "domain": "y"},
]
RAW: dict[str, Any] = {"template": False, "progress": False}


def lab(family: str = "qwen3_next", capacity: int = 4, **options: Any) -> Lab:
    return moelab.load(stock.folder(family), capacity, **options)


# -- the model against itself ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_never_forks_from_itself(family: str, temperature: float) -> None:
    with lab(family) as own:
        found = compare_generation(
            own, PROMPTS, on_miss="load", max_tokens=12, temperature=temperature,
            seeds=(0, 1) if temperature else (0,), **RAW,
        )  # fmt: skip
    frame = found.frame
    assert len(frame) == 3 * (2 if temperature else 1)
    assert frame["fork"].isna().all()
    assert frame["text_full"].equals(frame["text_constrained"])
    assert frame["nll_full"].equals(frame["nll_constrained"])
    whole = found.summary[found.summary["domain"] == "all"].set_index("metric")
    assert whole.loc["forked", "difference"] == 0 and whole.loc["nll", "difference"] == 0
    assert whole.loc["same_tokens", "difference"] == frame["ids_full"].map(len).mean()


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}])
def test_the_full_text_is_the_labs_own(options: dict[str, Any]) -> None:
    """It is what `lab.generate` writes, though its prompt is read in two goes."""
    with lab() as own:
        found = compare_generation(
            own, PROMPTS, on_miss="drop", max_tokens=10, temperature=0.8, seeds=(3,),
            **RAW, **options,
        )  # fmt: skip
        texts = [
            own.generate(p["text"], 10, template=False, temperature=0.8, seed=3, **options)
            for p in PROMPTS
        ]
    assert found.frame["text_full"].tolist() == texts
    assert found.frame["fork"].notna().any()


# -- the constrained text ----------------------------------------------------------------------


def by_hand(own: Lab, ids: list[int], count: int) -> list[int]:
    """Greedy, one token at a time: the prompt but its last token exact, the rest dropped."""
    own.set_on_miss("load")
    cache = make_prompt_cache(own.model)
    mx.eval(own.model(mx.array([ids[:-1]]), cache=cache))
    mx.eval([part.state for part in cache])
    own.set_on_miss("drop")
    out = [ids[-1]]
    while len(out) <= count and out[-1] not in own.tokenizer.eos_token_ids:
        out.append(int(own.model(mx.array([out[-1:]]), cache=cache)[0, -1].argmax().item()))
    return out[1:]


@pytest.mark.parametrize("family", ["qwen3_next", "olmoe"])
def test_the_constrained_text_is_that_of_a_plain_loop(family: str) -> None:
    with lab(family) as own:
        for prompts in (PROMPTS, PROMPTS[1:2]):  # what ran before leaves nothing behind
            found = compare_generation(
                own, prompts, on_miss="drop", max_tokens=8, temperature=0, **RAW
            ).frame
            for row in found.itertuples():
                text = next(p["text"] for p in PROMPTS if p["id"] == row.prompt)
                want = by_hand(own, list(own.tokenizer.encode(text)), 8)
                assert row.ids_constrained == want
                assert first_fork(row.ids_full, want) == (None if row.fork is pd.NA else row.fork)
            assert found["fork"].notna().any()


def test_both_draw_the_same_random_numbers() -> None:
    """Where it is so hot that only the draw decides, models that differ draw the same tokens."""
    with lab() as own:
        hot = compare_generation(
            own, PROMPTS[:1], on_miss="drop", max_tokens=20, temperature=1e6, top_k=0, top_p=1.0,
            seeds=(0, 1), **RAW,
        ).frame  # fmt: skip
    assert hot["fork"].isna().all()
    assert (hot["nll_full"] == hot["nll_constrained"]).all()
    assert hot["ids_full"][0] != hot["ids_full"][1], "the seed decides nothing"


def test_one_token_prompts_and_the_labs_own_action() -> None:
    with lab(on_miss="substitute", swap_budget=1) as own:
        found, said = pairs(
            own, [Ask("short", "all", (7,))], own.miss_action, swap_budget=1, max_tokens=6,
            seeds=[0], sampling={"temperature": 0.0}, scored=True, progress=False,
        )  # fmt: skip
        assert len(found[0].constrained.ids) <= 6 and not math.isnan(found[0].nll_full)
        whole = compare_generation(own, PROMPTS[:1], max_tokens=6, temperature=0, **RAW)
        assert whole.settings["on_miss"] == "substitute" and whole.settings["swap_budget"] == 1
        lowest = {str(site.layer): [0, 1, 2, 3] for site in own.sites}
        bank = {layer: sorted(held) for layer, held in said["initial_bank"].items()}
        assert bank == lowest and whole.settings["initial_bank"] == said["initial_bank"]
        assert (own.on_miss, own.swap_budget) == ("substitute", 1)
    assert "substitute" in repr(whole) and "<table" in whole._repr_html_()


def test_end_of_text_ends_a_text() -> None:
    with lab() as own:
        free = compare_generation(own, PROMPTS[:1], on_miss="drop", max_tokens=8, temperature=0,
                                  **RAW).frame.iloc[0]  # fmt: skip
        end = free["ids_full"][3]
        first = free["ids_full"].index(end)
        ends = own.tokenizer.eos_token_ids
        ends.add(end)
        try:
            cut = compare_generation(own, PROMPTS[:1], on_miss="load", max_tokens=8, temperature=0,
                                     **RAW).frame.iloc[0]  # fmt: skip
        finally:
            ends.discard(end)
    assert cut["ids_full"] == free["ids_full"][: first + 1]
    assert cut["ended_full"] and cut["ended_constrained"] and not free["ended_full"]
    assert cut["length_full"] == first
    assert cut["nll_full"] > 0  # the end counts as a token
    want = seq_rep_n(free["ids_full"][:first], 1)
    assert cut["seq_rep_1_full"] == want or (math.isnan(want) and math.isnan(cut["seq_rep_1_full"]))


# -- scores ------------------------------------------------------------------------------------


def test_scores_are_those_of_stock_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "SCORED_AT_ONCE", 5)  # several passes
    path = stock.folder("olmoe")
    model, _ = stock.stock(path)
    ids, text = tiny.prompt(9), tuple(tiny.prompt(22)[9:])
    cache = make_prompt_cache(model)
    model(mx.array([ids[:-1]]), cache=cache)
    want = []
    for fed, token in zip([ids[-1], *text[:-1]], text, strict=True):
        logits = np.array(model(mx.array([[fed]]), cache=cache)[0, -1].astype(mx.float32))
        logits = logits.astype(np.float64)
        want.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])
    with lab("olmoe") as own:
        start = Beginning(own, ids, "p")
        got = start.score(Written(text, "", False))
        assert got == pytest.approx(np.mean(want), abs=1e-5)
        assert start.score(Written(text, "", False)) == got
        own.set_on_miss("drop")
        with pytest.raises(StudyError, match="on_miss='load'"):
            Beginning(own, ids, "p")


def test_both_texts_are_scored_under_the_full_model() -> None:
    with lab() as own:
        frame = compare_generation(own, PROMPTS, on_miss="drop", max_tokens=10, temperature=0,
                                   **RAW).frame  # fmt: skip
        own.on_miss = "load"
        for row in frame.itertuples():
            text = next(p["text"] for p in PROMPTS if p["id"] == row.prompt)
            start = Beginning(own, list(own.tokenizer.encode(text)), row.prompt)
            for side in ("full", "constrained"):
                ids = tuple(getattr(row, f"ids_{side}"))
                assert getattr(row, f"nll_{side}") == start.score(Written(ids, "", False))


# -- the lab afterwards --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["go_on", "score"])
def test_the_lab_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    with lab(on_miss="substitute", swap_budget=2) as own:
        calls = 0
        real = getattr(Beginning, where)

        def fails(self: Beginning, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:  # of go_on: the second constrained text
                raise error("here")
            return real(self, *args)

        monkeypatch.setattr(Beginning, where, fails)
        with pytest.raises(error, match="here"):
            compare_generation(own, PROMPTS, on_miss="drop", max_tokens=4, temperature=0, **RAW)
        assert (own.on_miss, own.swap_budget) == ("substitute", 2)
        monkeypatch.undo()
        again = own.generate(tiny.prompt(8), 6, temperature=0)
        own.reset()
        assert own.generate(tiny.prompt(8), 6, temperature=0) == again


def test_a_recorded_lab_is_refused() -> None:
    with lab() as own, own.record(), pytest.raises(MoelabError, match="being recorded"):
        compare_generation(own, PROMPTS, on_miss="drop", max_tokens=4, temperature=0, **RAW)


# -- frame, summary and bad input ------------------------------------------------------------------


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with lab() as own:
        once = compare_generation(own, PROMPTS, on_miss="drop", max_tokens=6, temperature=0, **RAW)
        monkeypatch.setattr(pairing, "BATCH", 1)
        each = compare_generation(own, PROMPTS, on_miss="drop", max_tokens=6, temperature=0, **RAW)
    pd.testing.assert_frame_equal(once.frame, each.frame)
    assert once.frame["prompt"].tolist() == ["a", "b", "c"]
    domains = once.summary["domain"].drop_duplicates().tolist()
    assert domains == ["x", "y", "all"]


def test_prompts_are_cut_where_asked() -> None:
    with lab() as own:
        found = compare_generation(own, PROMPTS[:1], on_miss="drop", max_tokens=4, temperature=0,
                                   prompt_tokens=5, progress=False)  # fmt: skip
        ids = own.tokenizer.encode(PROMPTS[0]["text"])[:5]
        assert found.frame["ids_constrained"][0] == by_hand(own, list(ids), 4)
        with pytest.raises(StudyError, match=r"'a' has \d+ tokens, and prompt_tokens asks for"):
            compare_generation(own, PROMPTS[:1], prompt_tokens=500, max_tokens=4, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1), "temperature": 1.0}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (0, 1), "temperature": 0.0}, "nothing is drawn"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prompts": []}, "no text"),
        ({"on_miss": "lose"}, "on_miss must be"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    given = {"prompts": PROMPTS, "progress": False, **options}
    with lab() as own, pytest.raises(ValueError, match=message):
        compare_generation(own, given.pop("prompts"), **given)


def test_logits_that_are_no_numbers_are_named() -> None:
    with lab() as own:
        start = Beginning(own, tiny.prompt(6), "the text")
        head = own.model.lm_head if "lm_head" in own.model else None
        assert head is not None
        kept = head["scales"]
        head["scales"] = kept * float("nan")
        try:
            with pytest.raises(StudyError, match=r"NaN logits .* position 6 of 'the text'"):
                start.score(Written((3, 4), "", False))
        finally:
            head["scales"] = kept


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_first_fork(a: list[int], b: list[int]) -> None:
    longest = max(len(a), len(b))
    differs = [i for i in range(longest) if a[i : i + 1] != b[i : i + 1]]
    assert first_fork(a, b) == (differs[0] if differs else None)


def test_paired_means() -> None:
    prompts, domains = ["a", "a", "b", "c", "d"], ["x", "x", "x", "y", "y"]
    full = [1.0, 2.0, 3.0, math.nan, 5.0]
    other = [2.0, 2.0, 5.0, 1.0, 5.0]
    table = paired_means(prompts, domains, full, other).set_index("domain")
    assert table.index.tolist() == ["x", "y", "all"]
    assert table.loc["x", "difference"] == 1.0 and table.loc["x", "pairs"] == 3
    assert table.loc["all", "difference"] == 0.75 and table.loc["all", "clusters"] == 3
    assert table.loc["all", "full"] == pytest.approx(11 / 4)
    assert table.loc["x", "low"] < 1.0 < table.loc["x", "high"]
    none = paired_means(["a"], ["x"], [math.nan], [1.0]).iloc[0]
    assert none["pairs"] == 0 and math.isnan(none["difference"])


def test_a_share_without_a_single_difference_is_not_certain() -> None:
    names = [f"p{i}" for i in range(20)]
    shared = paired_means(names, ["x"] * 20, None, [1.0] * 20, share=True).iloc[-1]
    assert shared["difference"] == 1.0 and shared["high"] == 1.0
    assert shared["low"] == pytest.approx(0.025 ** (1 / 20))  # Clopper and Pearson, 20 of 20
    same = paired_means(names, ["x"] * 20, [1.0] * 20, [1.0] * 20, share=True).iloc[-1]
    assert -same["low"] == same["high"] == pytest.approx(1 - 0.025 ** (1 / 20))
