"""`moelab.sweep`: each row is what a loop by hand over plain labs finds.

The tests of swept events (chunks that need more experts than there are slots) are in
`test_sweep.py`; this is the study.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moelab
from moelab import loading
from moelab.check.families import build as building
from moelab.check.families.configs import config_of
from moelab.errors import (
    CapacityError,
    MissActionError,
    MoelabError,
    PinsError,
    PolicyError,
    ProfileError,
    StudyError,
)  # fmt: skip
from moelab.experts.misses import LowBit, Reroute
from moelab.lab import Lab
from moelab.quality import judge as judging
from moelab.quality.judge import Reference, copied, judge, quantised
from moelab.quality.window import Window, windows_of
from moelab.routing import replay as replaying
from moelab.study import runner as running
from moelab.study.drawn import drawn_pins
from moelab.study.rows import COLUMNS, checked_rows
from moelab.study.sweep import Sweep, sweep
from tests.support import stock, tiny
from tests.support.sweeps import PROMPTS

PREFIX, TOKENS = 12, 5
PICKED = 8
"""Slots a token of the tiny longcat: two layers of four."""
TINY: dict[str, Any] = {
    "prompts": PROMPTS, "prefix": PREFIX, "tokens": TOKENS, "progress": False,
}  # fmt: skip
PINS = {0: [15, 3], 1: [7]}


@pytest.fixture(scope="module")
def path() -> Path:
    return stock.folder("olmoe")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lab]]:
    """Every lab that a test loads, in order."""
    made: list[Lab] = []
    load = loading.load

    def noted(*args: Any, **kwargs: Any) -> Lab:
        made.append(load(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(loading, "load", noted)
    yield made


def windows(lab: Lab, prefix: int = PREFIX, tokens: int = TOKENS) -> list[Window]:
    return windows_of(lab.tokenizer, PROMPTS, prefix=prefix, tokens=tokens)


def exact_by_hand(lab: Lab, window: Window, bits: int | None = None) -> dict[str, Any]:
    """Runs a window on a plain lab from a reset bank, and counts what its judged tokens did."""
    lab.reset()
    cache: Any = make_prompt_cache(lab.model)
    with lab.record() as rec:
        mx.eval(lab.model(mx.array([list(window.tokens[: window.prefix])]), cache=cache))
        cache = quantised(cache, bits)
        for token in window.fed:
            mx.eval(lab.model(mx.array([[token]]), cache=cache))
    judged = rec.tokens[rec.tokens["position"] >= window.prefix]
    assert len(judged) == window.judged
    loads = rec.loads[rec.loads["position"] >= window.prefix]
    swept = rec.routing[rec.routing["position"] < window.prefix].groupby("layer")["expert"]
    return {
        "routed": int((judged["hits"] + judged["misses"]).sum()),
        "hits": int(judged["hits"].sum()),
        "loads": len(loads),
        "bytes_read": int(judged["bytes_read"].sum()),
        "most": int(swept.nunique().max()),
    }


def check_exact(found: pd.DataFrame, lab: Lab, all_windows: list[Window], **which: Any) -> int:
    """Compares replayed rows with runs by hand; returns the most experts that a prefix needs."""
    most = 0
    for window in all_windows:
        want = exact_by_hand(lab, window, which.get("bits"))
        most = max(most, want.pop("most"))
        row = found[found["prompt"] == window.document]
        assert len(row) == 1
        assert row["source"].item() == "replay"
        assert {name: row[name].item() for name in want} == want, window.document
        assert row["hit_rate"].item() == want["hits"] / want["routed"]
    return most


# -- replayed is run -----------------------------------------------------------------------


@pytest.mark.parametrize("pins", [None, PINS], ids=["free", "pinned"])
def test_replayed_points_are_what_a_run_does(path: Path, pins: Any) -> None:
    policies, capacities = ["lru", "lfru", "s3_fifo", "static"], [6, 9, 16]
    some = {**TINY, "prompts": PROMPTS[:2]}
    found = sweep(path, capacities, pins=pins, policy=policies, **some).frame
    assert len(found) == len(policies) * len(capacities) * 2
    assert set(found["source"]) == {"replay"}
    loaded = 0
    for policy in policies:
        for capacity in capacities:
            rows = found[(found["policy"] == policy) & (found["capacity"] == capacity)]
            with moelab.load(path, capacity, policy=policy, pins=pins) as lab:
                most = check_exact(rows, lab, windows(lab)[:2])
                # So that swept chunks are among what is compared.
                assert most > 9
            loaded += rows["loads"].sum()
            assert (rows["loads"].sum() == 0) == (capacity == 16)
    assert loaded > 100


def test_slots_that_weigh_nothing_are_not_routed(tmp_path: Path) -> None:
    """Longcat's identities reach the bank as expert 0 at weight 0: loaded, and no hit."""
    odd = building.build(tmp_path / "odd", config_of("longcat_flash"), quant=tiny.QUANT)
    found = sweep(odd, capacity=8, on_miss=["load", "drop"], **TINY).frame
    with moelab.load(odd, 8) as lab:
        check_exact(found[found["on_miss"] == "load"], lab, windows(lab))
    rows = found.pivot(index="prompt", columns="on_miss", values="routed")
    assert (rows < PICKED * TOKENS).any().all()


def test_quality_of_exact_points_is_the_full_models(path: Path) -> None:
    found = sweep(path, [6, 16], **TINY).frame
    assert (found[["kl_mean", "kl_sum", "kl_max", "kl_p99", "ln_ppl_ratio"]] == 0).all(axis=None)
    assert (found["same_top1"] == 1).all()
    with moelab.load(path, 6) as lab:
        for window in windows(lab):
            frame = judge(lab, window, Reference(lab, window), "load")
            assert (frame["kl"] == 0).all()
            rows = found[found["prompt"] == window.document]
            assert set(rows["nll"]) == {-frame["logprob"].mean()}
            assert set(rows["ppl_reference"]) == {np.exp(-frame["logprob_reference"].mean())}


def test_a_quantised_cache_is_replayed_from_its_own_run(lab_path: Path) -> None:
    """Its routing is another: the lab model, whose heads are wide enough to be quantised."""
    prompts = [{"id": "a", "text": "def area(r):\n    return 3.14159 * r * r\n\nprint(area(2))\n"}]
    given: dict[str, Any] = {"prompts": prompts, "prefix": 8, "tokens": 8, "progress": False}
    found = sweep("lab", 16, kv_bits=[None, 4], on_miss=["load", "drop"], **given).frame
    with moelab.load("lab", 16) as lab:
        (window,) = windows_of(lab.tokenizer, prompts, prefix=8, tokens=8)
        exact = found[found["on_miss"] == "load"]
        check_exact(exact[exact["kv_bits"].isna()], lab, [window])
        check_exact(exact[exact["kv_bits"] == 4], lab, [window], bits=4)
        reference = Reference(lab, window)
        for action in ("load", "drop"):
            frame = judge(lab, window, reference, action, kv_bits=4)
            row = found[(found["on_miss"] == action) & (found["kv_bits"] == 4)]
            assert row["kl_sum"].item() == frame["kl"].sum() > 0
    plain, few = exact["kv_bits"].isna(), exact["kv_bits"] == 4
    # Else replaying the run with the model's own cache would have been as good.
    assert exact.loc[plain, "hits"].item() != exact.loc[few, "hits"].item()
    assert exact.loc[plain, "bytes_cache"].item() > exact.loc[few, "bytes_cache"].item()


def test_what_is_not_replayed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays get exact runs only, and lossy points and quantised caches run."""
    replayed: list[pd.DataFrame] = []
    ran: list[tuple[str, int | None]] = []
    replay, judged, judge = replaying.replay, judging.judged, judging.judge

    def replay_noted(routing: Any, *args: Any, **kwargs: Any) -> Any:
        replayed.append(routing)
        return replay(routing, *args, **kwargs)

    def judged_noted(lab: Lab, window: Window, reference: Any, action: Any, **kw: Any) -> Any:
        ran.append((action.name, kw["kv_bits"]))
        frame, routing = judged(lab, window, reference, action, **{**kw, "kv_bits": None})
        return frame, routing

    def judge_noted(lab: Lab, window: Window, reference: Any, action: Any, **kw: Any) -> Any:
        ran.append((action.name, kw["kv_bits"]))
        return judge(lab, window, reference, action)

    monkeypatch.setattr(replaying, "replay", replay_noted)
    monkeypatch.setattr(running, "judged", judged_noted)
    monkeypatch.setattr(running, "judge", judge_noted)
    actions = ["load", "drop", "substitute", "reroute", "wrong_slot"]
    given = {**TINY, "prompts": PROMPTS[:2]}
    found = sweep(
        path, [6, 9], policy=["lru", "min"], on_miss=actions, kv_bits=[None, 8], **given
    ).frame
    exact = found["on_miss"] == "load"
    assert (found["source"] == np.where(exact, "replay", "run")).all()
    assert len(replayed) == exact.sum() == 2 * 2 * 2 * 2
    # Two capacities of each lossy action and cache; and one exact run a prompt with that cache.
    once = dict.fromkeys([(a, b) for a in actions[1:] for b in (None, 8)], 2 * 2)
    counted = pd.Series(ran).value_counts().to_dict()
    assert counted == {**once, ("load", 8): 2}
    distinct = {id(frame) for frame in replayed}
    assert len(distinct) == 2 * 2, "one recorded run a prompt and cache"


# -- run points ----------------------------------------------------------------------------


def lossy_by_hand(lab: Lab, window: Window, action: Any, budget: int | None) -> dict[str, Any]:
    """Judges a window on a plain lab, and records the same run by hand."""
    frame = judge(lab, window, Reference(lab, window), action, swap_budget=budget)
    lab.set_on_miss("load")
    cache: Any = make_prompt_cache(lab.model)
    mx.eval(lab.model(mx.array([list(window.tokens[: window.prefix])]), cache=cache))
    mx.eval([part.state for part in cache])
    cache = copied(cache)
    lab.set_on_miss(action, swap_budget=budget)
    with lab.record() as rec:
        for token in window.fed:
            mx.eval(lab.model(mx.array([[token]]), cache=cache))
    kl, nll = frame["kl"], -frame["logprob"].mean()
    reference = -frame["logprob_reference"].mean()
    return {
        "hits": int(rec.tokens["hits"].sum()),
        "routed": len(rec.routing),
        "loads": len(rec.loads),
        "bytes_read": int(rec.tokens["bytes_read"].sum()),
        "kl_mean": kl.sum() / len(kl),
        "kl_sum": kl.sum(),
        "kl_max": kl.max(),
        "kl_p99": np.quantile(kl, 0.99),
        "nll": nll,
        "nll_reference": reference,
        "ln_ppl_ratio": nll - reference,
        "ppl": np.exp(nll),
        "ppl_reference": np.exp(reference),
        "same_top1": frame["same_top1"].mean(),
    }


@pytest.mark.parametrize("budget", [None, 0, 1])
def test_run_points_are_what_plain_labs_do(path: Path, budget: int | None) -> None:
    with moelab.load(path, 16) as lab:
        profile = moelab.profile(lab, [p["text"] for p in PROMPTS], tokens=16, progress=False)
    pins: list[Any] = [None, ("two", PINS), moelab.Pins(profile, top=2)]
    actions: list[Any] = ["drop", "substitute", Reroute(strength=0.2), LowBit(bits=3), "low_bit"]
    found = sweep(
        path, [9, 6], pins=pins, policy="lfru", on_miss=actions,
        swap_budget=budget, **{**TINY, "prompts": PROMPTS[:1]},
    ).frame  # fmt: skip
    assert len(found) == 2 * 3 * 5
    assert set(found["pins"]) == {"none", "two", "top=2"}
    labels = ["drop", "substitute", "reroute(strength=0.2)", "low_bit(bits=3)", "low_bit"]
    assert list(found["on_miss"].unique()) == labels
    # A lab of its own for each setting would be a minute: some of them, and each list's values.
    chosen = [(6, 0, 0), (9, 1, 1), (6, 2, 2), (9, 2, 3), (6, 0, 4)]
    moved = 0
    for capacity, pin, action in chosen:
        spec = pins[pin][1] if isinstance(pins[pin], tuple) else pins[pin]
        with moelab.load(path, capacity, pins=spec, policy="lfru") as lab:
            for window in windows(lab)[:1]:
                want = lossy_by_hand(lab, window, actions[action], budget)
                row = found[
                    (found["capacity"] == capacity)
                    & (found["on_miss"] == labels[action]) & (found["prompt"] == window.document)
                    & (found["pins"] == ("none", "two", "top=2")[pin])
                ]  # fmt: skip
                assert row["source"].item() == "run"
                assert {name: row[name].item() for name in want} == want
                moved += want["loads"]
                assert want["kl_sum"] > 0
    assert (moved == 0) == (budget == 0)
    assert set(found["swap_budget"]) == {-1 if budget is None else budget}


def test_a_whole_bank_is_exact_whatever_the_action(path: Path) -> None:
    found = sweep(path, 16, on_miss=["drop", "low_bit"], kv_bits=None, **TINY).frame
    assert set(found["source"]) == {"run"}
    assert (found["kl_max"] == 0).all() and (found["hit_rate"] == 1).all()
    assert (found["bytes_low_bit"] == 0).all() and (found["loads"] == 0).all()


def test_a_profile_fills_the_bank(path: Path) -> None:
    with moelab.load(path, 16) as lab:
        profile = moelab.profile(lab, [p["text"] for p in PROMPTS], tokens=16, progress=False)
    lowest = sweep(path, 6, on_miss="drop", **TINY).frame
    filled = sweep(path, 6, on_miss="drop", profile=profile, **TINY).frame
    with moelab.load(path, 6, pins=moelab.Pins(profile, top=0), on_miss="drop") as lab:
        for window in windows(lab):
            want = judge(lab, window, Reference(lab, window), "drop")["kl"].sum()
            assert filled.loc[filled["prompt"] == window.document, "kl_sum"].item() == want
    assert not np.allclose(lowest["kl_sum"], filled["kl_sum"])
    assert set(lowest["initial"]) == {"the lowest ids"}
    assert set(filled["initial"]) == {"the profile's order, then the lowest ids"}


def test_drawn_pins(path: Path) -> None:
    found = sweep(path, 6, pins=[None, "random:2"], on_miss=["load", "drop"], seeds=[0, 3, 7],
                  **TINY).frame  # fmt: skip
    seeds = found.groupby("pins")["seed"].unique()
    assert sorted(seeds["random:2"]) == [0, 3, 7]
    assert list(seeds["none"]) == [0], "where nothing is drawn a seed changes nothing"
    assert found.groupby(["on_miss", "pins"]).size().tolist() == [4, 12, 4, 12]
    for seed in (0, 3, 7):
        with moelab.load(path, 6) as lab:
            pins = drawn_pins({site.layer: site.experts for site in lab.sites}, 2, seed)
        assert all(len(ids) == 2 for ids in pins.values())
        rows = found[(found["seed"] == seed) & (found["pins"] == "random:2")]
        with moelab.load(path, 6, pins=pins) as lab:
            check_exact(rows[rows["on_miss"] == "load"], lab, windows(lab))
    hits = found[(found["pins"] == "random:2") & (found["on_miss"] == "load")]
    assert hits.groupby("seed")["hits"].sum().nunique() > 1


def test_policies_that_know_the_future_have_exact_points_only(path: Path) -> None:
    made = sweep(path, 6, policy=["lru", "min"], on_miss=["load", "drop"], **TINY)
    points = set(zip(made.frame["policy"], made.frame["on_miss"], strict=True))
    assert points == {("lru", "load"), ("min", "load"), ("lru", "drop")}
    loads = made.frame.groupby(["policy", "on_miss"])["loads"].sum()
    assert loads["min", "load"] < loads["lru", "load"]
    assert "left out" in repr(made)
    with pytest.raises(StudyError, match="min know the future"):
        sweep(path, 6, policy="min", on_miss="drop", **TINY)


# -- the lab and the result ------------------------------------------------------------------


def test_a_lab_is_left_as_it_was_found(path: Path) -> None:
    with moelab.load(path, [8, 16], pins=PINS, policy="lfru", on_miss="drop",
                     swap_budget=1) as lab:  # fmt: skip
        before = repr(lab)
        banks = {b.layer: sorted(b.residency.slot_of) for b in lab.attachment.bank.layers}
        prompt = windows(lab)[0].tokens
        text = lab.generate(list(prompt), 8, temperature=0)
        found = sweep(lab, [6, 16], on_miss=["low_bit", "load"], policy="lru", **TINY)
        assert repr(lab) == before
        assert (lab.capacities, lab.policy, lab.on_miss, lab.swap_budget) == (
            [8, 16], "lfru", "drop", 1,
        )  # fmt: skip
        assert lab.pins == {0: frozenset({3, 15}), 1: frozenset({7})}
        assert {b.layer: sorted(b.residency.slot_of) for b in lab.attachment.bank.layers} == banks
        assert {b.layer: b.residency.policy.name for b in lab.attachment.bank.layers} == (
            dict.fromkeys(banks, "lfru")
        )
        lab.reset()
        assert lab.generate(list(prompt), 8, temperature=0) == text
        with pytest.raises(StudyError, match="too short"):
            sweep(lab, 6, prompts=["short"])
        with lab.record(), pytest.raises(StudyError, match="being recorded"):
            sweep(lab, 6, **TINY)
        with pytest.raises(StudyError, match="pack cannot be set"):
            sweep(lab, 6, pack=False, **TINY)
        assert repr(lab) == before
    pd.testing.assert_frame_equal(
        found.frame, sweep(path, [6, 16], on_miss=["low_bit", "load"], **TINY).frame
    )
    with pytest.raises(MoelabError, match="was closed"):
        sweep(lab, 6, **TINY)


def test_one_model_at_a_time(path: Path, loads: list[Lab]) -> None:
    sweep(path, [6, 9], pins=[None, PINS], policy=["lru", "lfru"], on_miss=["load", "drop"],
          **{**TINY, "prompts": PROMPTS[:1]})  # fmt: skip
    assert len(loads) == 1
    assert repr(loads[0]).endswith("closed>")
    with pytest.raises(StudyError, match="too short"):
        sweep(path, 6, prompts=["short"])
    assert all(repr(lab).endswith("closed>") for lab in loads)


def test_blocks_of_prompts_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep(path, [6, 9], on_miss=["load", "drop"], **TINY).frame
    monkeypatch.setattr(
        "moelab.study.sweep.blocks", lambda windows: [tuple(windows[:3]), tuple(windows[3:])]
    )
    pd.testing.assert_frame_equal(
        sweep(path, [6, 9], on_miss=["load", "drop"], **TINY).frame, whole
    )


def test_the_result(path: Path) -> None:
    matplotlib.use("Agg")
    made = sweep(path, [6, 0.5, 16], on_miss=["load", "drop"], pins=[None, "random:1"],
                 split="selection", **TINY)  # fmt: skip
    frame = made.frame
    assert list(frame.columns) == list(COLUMNS)
    assert frame["capacity"].unique().tolist() == [6, 8, 16]
    assert set(frame["split"]) == {"selection"}
    assert set(frame["domain"]) == {"prose", "python", "shell"}
    checked_rows(frame)
    assert "drop" in repr(made) and "<table>" in made._repr_html_()
    points = made.points()
    drop = frame[(frame["on_miss"] == "drop") & (frame["pins"] == "none")]
    for capacity, rows in drop.groupby("capacity"):
        one = points[
            (points["on_miss"] == "drop") & (points["pins"] == "none")
            & (points["capacity"] == capacity)
        ]  # fmt: skip
        assert one["kl_mean"].item() == pytest.approx(rows["kl_sum"].sum() / rows["tokens"].sum())
        assert one["ppl"].item() == pytest.approx(np.exp(rows["nll"].mean()))
        assert one["hit_rate"].item() == rows["hits"].sum() / rows["routed"].sum()
    assert made.plot.frontier("kl_mean").get_xlabel()
    assert made.plot.capacity("ln_ppl_ratio").get_ylabel()


def test_the_shipped_texts_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab import labmodel

    few = {s: labmodel.texts(split=s)[:2] for s in labmodel.SPLITS}
    monkeypatch.setattr(labmodel, "texts", lambda domain=None, split=None: few[split])
    made = sweep("lab", 32, prefix=8, tokens=2, progress=False)
    assert set(made.frame["split"]) == {"selection"}
    assert set(made.frame["prompt"]) == {text["id"] for text in few["selection"]}
    assert made.frame["tokens"].tolist() == [2, 2]


def test_the_bar_says_the_point_and_the_time_left(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**TINY, "prompts": PROMPTS[:1], "progress": True}
    sweep(path, [9, 6], on_miss=["load", "drop"], **given)
    told = capsys.readouterr().err
    for point in ("exact runs", "C=9 load lru", "C=6 load lru", "C=9 drop lru", "C=6 drop lru"):
        assert point in told
    assert re.search(r"\d\d:\d\d left", told)
    sweep(path, 6, **TINY)
    assert not capsys.readouterr().err


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"capacity": []}, StudyError, "capacity is an empty list"),
        ({"capacity": [6, 6]}, StudyError, "capacity has 6 twice"),
        ({"capacity": True}, StudyError, "got True"),
        ({"capacity": "auto"}, StudyError, "got 'auto'"),
        ({"capacity": [{0: 6}]}, StudyError, "the same for every layer"),
        ({"capacity": 1.5}, CapacityError, "between 0 and 1"),
        ({"capacity": 0}, CapacityError, "got 0"),
        ({"policy": ["lru", "mru"]}, PolicyError, "no policy 'mru'"),
        ({"policy": ["lru", "lru"]}, StudyError, "policy has 'lru' twice"),
        ({"on_miss": "skip"}, MissActionError, "got 'skip'"),
        ({"on_miss": ["low_bit", LowBit()]}, StudyError, "twice"),
        ({"on_miss": []}, StudyError, "on_miss is an empty list"),
        ({"kv_bits": [None, 3]}, StudyError, "8, 4, or None"),
        ({"seeds": -1}, StudyError, "from 0 on, got -1"),
        ({"seeds": []}, StudyError, "seeds is an empty list"),
        ({"swap_budget": -1}, MissActionError, "swap_budget"),
        ({"pins": [3, 5]}, PinsError, r"give \[\[3, …\]\]"),
        ({"pins": "random:x"}, PinsError, "random:8"),
        ({"pins": "random:0"}, PinsError, "from 1 on"),
        ({"pins": [PINS, {0: [1]}]}, StudyError, "labels that differ"),
        ({"pins": [("", PINS)]}, PinsError, "label of pins is empty"),
        ({"pins": [5.5]}, PinsError, "got 5.5"),
        ({"pins": "nowhere.json"}, ProfileError, "nowhere.json"),
        ({"profile": 5}, StudyError, "moelab.Profile or the path"),
        ({"prefix": 0}, StudyError, "prefix is a number of tokens"),
        ({"tokens": "40"}, StudyError, "tokens is a number of tokens"),
        ({"prompts": []}, StudyError, "There is no text"),
        ({"split": "train"}, StudyError, "calibration, selection, test"),
        ({"client": "tcp://x"}, StudyError, "client"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    changed: dict[str, Any], error: type[Exception], words: str, loads: list[Lab], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"capacity": 6, **TINY, **changed}
    with pytest.raises(error, match=words):
        sweep(stock.folder("olmoe"), out=tmp_path / "out", **given)
    assert not loads
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"capacity": [6, 17]}, CapacityError, "capacity 17"),
        ({"capacity": [9, 1]}, CapacityError, "top-k"),
        ({"capacity": [8, 0.5]}, StudyError, "8 and 0.5, which are both 8"),
        ({"capacity": [9, 5], "pins": "random:4"}, PinsError, "too many"),
        ({"pins": "random:17"}, PinsError, "more than the 16 experts"),
        ({"pins": [{9: [1]}]}, PinsError, "layer 9"),
        ({"prompts": [*PROMPTS, {"id": "tiny one", "text": "short"}]}, StudyError, "'tiny one'"),
    ],
)
def test_what_the_model_does_not_allow_is_refused_before_anything_runs(
    changed: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(running.Runner, "_run_exactly", never)
    given: dict[str, Any] = {"capacity": 6, **TINY, **changed}
    with pytest.raises(error, match=words):
        sweep(stock.folder("olmoe"), **given)


def test_a_profile_of_another_model(path: Path) -> None:
    with moelab.load(path, 16) as lab:
        profile = moelab.profile(lab, [p["text"] for p in PROMPTS], tokens=16, progress=False)
    other = stock.folder("olmoe", seed=9)
    with pytest.raises(ProfileError):
        sweep(other, 6, on_miss="drop", profile=profile, **TINY)
    with pytest.raises(ProfileError):
        sweep(other, 6, pins=moelab.Pins(profile, top=1), **TINY)


def test_the_baseline_is_not_announced_for_each_prompt(path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = sweep(path, 6, on_miss="wrong_slot", **TINY)
    assert isinstance(made, Sweep)
    assert not [w for w in told if "wrong_slot" in str(w.message)]
