"""Forecasts: the arithmetic against a loop by hand, calibrations, refusals, the lab as it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.bench.forecast import ForecastResult, ForecastRow, bench_forecast
from moelab.errors import CapacityError, PolicyError, SchemaError, StudyError
from moelab.study.bytes import LayerFacts, ModelFacts
from moelab.study.calibration import Calibration, calibrate
from moelab.study.calibration_fit import fitted_parts
from moelab.study.forecast import Forecast, forecast
from moelab.study.forecast_passes import steps_of_prompt
from moelab.study.forecast_results import forecast_from
from moelab.study.live_run import Live
from tests.support import tiny

EXPERTS, TOP_K, LAYERS = 8, 2, (1, 3)
DISK = {1: 100, 3: 70}


def hand_made(**changes: Any) -> Calibration:
    """Parts whose sums show which part was counted: none is a multiple of another."""
    told: dict[str, Any] = {
        "model": "hand", "fingerprint": "f" * 16, "layers": 2,
        "decode": {"base": 1.0, "context": 0.01, "missing": 0.3, "load": 0.07},
        "prefill": {"base": 2.0, "token": 0.11, "distinct": 0.013, "load": 0.05, "swept": 0.7},
        "whole_decode": {"base": 0.4, "context": 0.003},
        "whole_prefill": {"base": 0.9, "token": 0.021},
        "cold_load": 0.5, "warm_share": 1.0, "longest": 255,
    }  # fmt: skip
    return Calibration(**(told | changes))


def facts(fingerprint: str = "f" * 16) -> ModelFacts:
    layers = tuple(LayerFacts(n, EXPERTS, TOP_K, 2 * DISK[n], DISK[n]) for n in LAYERS)
    return ModelFacts("hand", "none", fingerprint, layers, 1000)


def made_up(lengths: list[int], seed: int = 0, step: str = "single") -> pd.DataFrame:
    """A routing frame; `step` says in which passes the recording was made."""
    random = np.random.default_rng(seed)
    rows = []
    for run, length in enumerate(lengths):
        for position in range(length):
            for layer in LAYERS:
                chosen = random.permutation(EXPERTS)[:TOP_K]
                for rank, expert in enumerate(chosen.tolist()):
                    made = {"single": position, "halves": position // 2, "one": 0}[step]
                    rows.append((run, made, position, layer, rank, expert))
    return pd.DataFrame(rows, columns=["run", "step", "position", "layer", "rank", "expert"])


def by_hand(
    frame: pd.DataFrame, prompt: int, tokens: int, capacity: int, c: Calibration,
    *, pins: tuple[int, ...] = (), cold: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The same by plain loops: an LRU bank as an ordered dictionary, seconds added up."""
    assert c.decode and c.prefill
    chosen: dict[tuple[int, int, int], list[int]] = {}
    for row in frame.itertuples():
        chosen.setdefault((row.run, row.position, row.layer), []).append(row.expert)
    first, seconds, count, hits, slots, prompt_bytes, read = [], 0.0, 0, 0, 0, 0, 0
    for run in sorted({r for r, _, _ in chosen}):
        length = 1 + max(p for r, p, _ in chosen if r == run)
        if length < prompt + 2:
            continue
        banks = {n: OrderedDict.fromkeys(pins) for n in LAYERS}
        known: dict[int, set[int]] = {n: set() for n in LAYERS}
        passes = ([list(range(prompt - 1))] if prompt > 1 else []) + [
            [p] for p in range(prompt - 1, min(length, prompt + 1 + tokens))
        ]
        lead = 0.0
        for positions in passes:
            chunk = positions[0] < prompt - 1
            distinct = loads = missing = swept = new = 0
            decoding = positions[0] > prompt
            for layer in LAYERS:
                bank = banks[layer]
                each = [chosen[run, p, layer] for p in positions]
                needed = sorted({e for ids in each for e in ids})
                absent = [e for e in needed if e not in bank]
                distinct += len(needed)
                loads += len(absent)
                missing += bool(absent)
                swept += len(needed) > capacity
                new += len(set(absent) - known[layer])
                known[layer] |= set(absent)
                if decoding:
                    slots += TOP_K * len(positions)
                    hits += sum(e not in absent for ids in each for e in ids)
                    read += len(absent) * DISK[layer]
                else:
                    prompt_bytes += len(absent) * DISK[layer]
                assert len(needed) <= capacity - len([p for p in pins if p not in needed])
                for e in needed:
                    bank[e] = None
                    if e not in pins:
                        bank.move_to_end(e)
                while len(bank) > capacity:
                    del bank[next(e for e in bank if e not in pins and e not in needed)]
            if chunk:
                p = c.prefill
                spent = p["base"] + p["token"] * len(positions) + p["distinct"] * distinct
                spent += p["load"] * loads + p["swept"] * swept
            else:
                d = c.decode
                spent = d["base"] + d["context"] * positions[0]
                spent += d["missing"] * missing + d["load"] * loads
            spent += (c.cold_load or 0) * new * cold
            if decoding:
                seconds, count = seconds + spent, count + 1
            else:
                lead += spent
        first.append(lead)
    return {
        "first_token_seconds": float(np.mean(first)), "tokens_per_second": count / seconds,
        "hit_rate": hits / slots, "prompt_bytes": prompt_bytes / len(first),
        "bytes_per_token": read / count,
    }  # fmt: skip


def of(
    frame: pd.DataFrame, prompt: int, tokens: int, capacity: int, *, policy: str = "lru",
    pins: tuple[int, ...] = (), calibration: Calibration | None = None, page_cache: str = "warm",
) -> Forecast:  # fmt: skip
    stepped, _ = steps_of_prompt(frame, prompt, tokens)
    return forecast_from(
        stepped, facts(), [capacity] * 2, policy, dict.fromkeys(LAYERS, pins),
        calibration or hand_made(), page_cache=page_cache,
    )  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(5, 7), st.integers(0, 99),
    st.sampled_from(["single", "halves", "one"]), st.booleans(),
)  # fmt: skip
def test_the_arithmetic_is_that_of_plain_loops(
    prompt: int, tokens: int, capacity: int, seed: int, step: str, cold: bool
) -> None:
    # A prompt's chunk of at most two tokens fits in the bank, so that the loop needs no sweep.
    frame = made_up([9, 4, 2, 6], seed, step)
    found = of(frame, prompt, tokens, capacity, page_cache="cold" if cold else "warm")
    expected = by_hand(frame, prompt, tokens, capacity, hand_made(), cold=cold)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name
    assert found.bytes == 1000 + capacity * 2 * sum(DISK.values())


def test_pins_are_there_from_the_start_and_stay() -> None:
    frame = made_up([9, 8], 5)
    found = of(frame, 2, 5, 5, pins=(0, 3))
    expected = by_hand(frame, 2, 5, 5, hand_made(), pins=(0, 3))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name


def test_a_chunk_of_more_experts_than_slots_is_swept_and_reads_each_once() -> None:
    frame = made_up([40], 1)
    needed = frame[frame["position"] < 29].groupby("layer")["expert"].nunique()
    assert (needed == EXPERTS).all()
    found, more = of(frame, 30, 4, 4), of(frame, 30, 4, 7)
    chunk = hand_made().prefill_seconds(29, 16, 16, 2)
    # And the two passes of single tokens before the first token.
    table = found.frame.set_index(["phase", "part"])
    alone = sum(1.0 + 0.01 * position for position in (29, 30))
    assert table.loc[("first token", "compute"), "seconds"] == pytest.approx(chunk[0] + alone)
    assert found.prompt_loads >= 16
    assert more.first_token_seconds < found.first_token_seconds


def test_where_all_experts_are_resident_nothing_is_read_and_one_pass_is_waited_for() -> None:
    found = of(made_up([12], 2), 5, 6, EXPERTS)
    assert found.first_token_seconds == pytest.approx(0.9 + 0.021 * 4 + 0.4 + 0.003 * 4)
    expected = 6 / sum(0.4 + 0.003 * position for position in range(6, 12))
    assert found.tokens_per_second == pytest.approx(expected)
    assert (found.hit_rate, found.bytes_per_token, found.prompt_bytes) == (1, 0, 0)
    lacking = hand_made(whole_decode=None, whole_prefill=None)
    with pytest.raises(StudyError, match="all their experts resident were not measured"):
        of(made_up([12], 2), 5, 6, EXPERTS, calibration=lacking)


def test_layers_of_both_kinds_share_the_compute() -> None:
    c = hand_made()
    half = c.decode_seconds(10, 1, 2, partial=0.5)
    assert half[0] == pytest.approx(0.5 * (1 + 0.1) + 0.5 * (0.4 + 0.03))
    assert half[1] == pytest.approx(0.3 + 0.14)
    whole = hand_made(decode=None, prefill=None).prefill_seconds(7, 0, 0, 0, partial=0.0)
    assert whole == (pytest.approx(0.9 + 0.147), 0)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3, 8]))
def test_more_slots_are_not_slower_and_more_costly_loads_not_faster(seed: int, prompt: int) -> None:
    frame = made_up([16, 14], seed)
    found = [of(frame, prompt, 5, capacity) for capacity in range(TOP_K, EXPERTS)]
    for fewer, more in itertools.pairwise(found):
        assert more.loads_per_token <= fewer.loads_per_token  # LRU's inclusion
        assert more.first_token_seconds <= fewer.first_token_seconds + 1e-9
    parts = hand_made().decode
    assert parts is not None
    dear = hand_made(decode=parts | {"load": 0.2})
    slow = of(frame, prompt, 5, TOP_K, calibration=dear)
    assert slow.tokens_per_second <= found[0].tokens_per_second
    cold = of(frame, prompt, 5, TOP_K, page_cache="cold")
    assert cold.first_token_seconds > found[0].first_token_seconds
    best = of(frame, prompt, 5, 4, policy="min")
    assert best.loads_per_token <= found[4 - TOP_K].loads_per_token or prompt > 1


def test_padding_gaps_and_rejected_drafts_are_left_out() -> None:
    frame = made_up([10, 10], 3)
    plain = of(frame, 3, 4, 4)
    pad = frame[frame["position"] == 0].assign(phase="padding", expert=7)
    # A draft that was rejected: the same position again, in an earlier step.
    draft = frame[(frame["run"] == 1) & (frame["position"] == 4)].assign(step=3, expert=0)
    both = pd.concat([frame.assign(phase="decode"), pad, draft.assign(phase="decode")])
    found = of(both, 3, 4, 4)
    pd.testing.assert_frame_equal(found.by_run, plain.by_run)
    gap = frame[~((frame["run"] == 0) & (frame["position"] == 1))]
    assert len(of(gap, 3, 4, 4).by_run) == 1


def test_recordings_that_are_too_short_or_edited_are_refused() -> None:
    frame = made_up([6, 5], 0)
    with pytest.raises(StudyError, match=r"need 7 tokens .* longest run has 6"):
        steps_of_prompt(frame, 5, 3)
    with pytest.raises(SchemaError, match="'position'"):
        steps_of_prompt(frame.drop(columns="position"), 2, 3)
    lossy = frame.assign(outcome="drop")
    with pytest.raises(StudyError, match="lossy miss action"):
        steps_of_prompt(lossy, 2, 3)
    stepped, runs = steps_of_prompt(frame, 3, 8)
    assert runs["tokens"].tolist() == [2, 1]
    assert sorted(stepped["step"].unique()) == [0, 1, 2, 3, 4]


def test_parts_are_found_again_whatever_a_few_points_say() -> None:
    random = np.random.default_rng(0)
    x = np.column_stack([np.ones(60), random.integers(1, 200, 60), random.integers(0, 40, 60)])
    truth = np.array([0.02, 0.0004, 0.003])
    y = x @ truth
    y[::9] *= 5  # interrupted by something else
    found, ranges, residual = fitted_parts(x, y)
    assert found == pytest.approx(truth, rel=1e-6)
    assert residual == pytest.approx(0, abs=1e-9)
    assert (ranges[:, 0] <= found + 1e-9).all() and (ranges[:, 1] >= found - 1e-9).all()
    # Each run has a slow observation, which no median of single ones sees: its sum counts.
    skewed = np.tile([1.0, 1.0, 1.0, 5.0], 10)
    mean, _, _ = fitted_parts(np.ones((40, 1)), skewed, np.repeat(np.arange(10), 4))
    assert mean == pytest.approx([2.0])
    even, _, _ = fitted_parts(np.ones((40, 1)), np.tile([1.0, 2.0, 2.0, 3.0], 10))
    assert even == pytest.approx([2.0])
    # Runs that differ are what an interval is of, not the many observations in them.
    apart = np.repeat([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], 20) * random.normal(1, 0.01, 120)
    wide = fitted_parts(np.ones((120, 1)), apart, np.repeat(np.arange(6), 20))[1]
    assert wide[0, 1] - wide[0, 0] >= 1
    # No part is negative, although the best line here would fall.
    down, _, _ = fitted_parts(np.column_stack([np.ones(4), np.arange(4)]), np.array([4.0, 3, 2, 1]))
    assert (down >= 0).all() and down[1] == 0


def test_a_calibration_survives_its_file_and_refuses_others(tmp_path: Path) -> None:
    made = hand_made(spread={"decode.base": [0.9, 1.2]}, machine={"chip": "none"})
    again = Calibration.read(made.save(tmp_path / "deep" / "c.json"))
    assert again == made
    assert "1000.000 ms a token [900.000, 1200.000]" in repr(made)
    with pytest.raises(StudyError, match="is of hand"):
        made.require("0" * 16)
    with pytest.raises(StudyError, match="'warm' or 'cold'"):
        made.require("f" * 16, "lukewarm")
    with pytest.raises(StudyError, match="no cold loads"):
        hand_made(cold_load=None).require("f" * 16, "cold")
    told = json.loads((tmp_path / "deep" / "c.json").read_text())
    for name, change in {
        "format": {"format": 99}, "seconds from 0 on": {"decode": told["decode"] | {"load": -1}},
        "decode must have": {"decode": {"base": 1}}, "cold_load is -1": {"cold_load": -1},
        "no calibration": {"others": 1},
    }.items():  # fmt: skip
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(told | change))
        with pytest.raises(StudyError, match=name):
            Calibration.read(bad)
    with pytest.raises(StudyError, match="no calibration"):
        Calibration.read(tmp_path / "none.json")


# -- a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[moelab.Lab]:
    folder = tiny.build(tmp_path_factory.mktemp("forecast") / "model", "qwen3_moe")
    with moelab.load(folder, 4, policy="lfu", pins=[1]) as made:
        yield made


def test_a_live_run_counts_what_the_bank_loads(lab: moelab.Lab) -> None:
    tokens = list(range(5, 40))
    seen: list[int] = []

    class Heard:
        def loaded(self, layer: int, loads: Any, seconds: Any) -> None:
            seen.append(len(loads))

    lab.reset()
    heard = Heard()
    lab.attachment.bank.watchers.append(heard)
    try:
        live = Live(lab, tokens, 9, 6)
    finally:
        lab.attachment.bank.watchers.remove(heard)
    assert [n for _, n, _ in live.chunks] == [8] and len(live.steps) == 6
    assert live.first_loads + sum(n for _, _, n in live.steps) == sum(seen)
    assert live.first > 0 and live.decode_seconds > 0


def test_a_forecast_counts_as_a_live_run_does(lab: moelab.Lab) -> None:
    """The bank's loads in a live run of the very text that was recorded, to the last one."""
    from moelab.study.runner import govern, left_as_found

    text = "the quick brown fox jumps over the lazy dog, and then once more to the river " * 2
    tokens = lab.tokenizer.encode(text)
    recorded = moelab.record_texts(lab, [text], prefix=20, tokens=20, progress=False)
    c = hand_made(fingerprint=lab.fingerprint)
    before = (lab.capacities, lab.policy, dict(lab.pins))
    for policy in ("lru", "lfu"):
        for prompt in (1, 2, 20):
            told = forecast(lab, 4, policy, prompt=prompt, tokens=12, recording=recorded,
                            calibration=c, progress=False)  # fmt: skip
            with left_as_found(lab):
                govern(lab, policy, {}, {}, slots=[4] * len(lab.sites))
                live = Live(lab, tokens, prompt, 12)
            assert told.prompt_loads == live.first_loads
            assert not told.settings["extrapolated"]
            assert told.loads_per_token * 12 == pytest.approx(sum(n for *_, n in live.steps))
    assert (lab.capacities, lab.policy, dict(lab.pins)) == before
    short = dataclasses.replace(c, longest=1)  # and so at most 34 tokens before another
    for prompt, count in ((57, 11), (57, 12)):
        routing = made_up([80]).assign(layer=lambda f: f["layer"].map(
            dict(zip(LAYERS, [site.layer for site in lab.sites][:2], strict=True))))  # fmt: skip
        told = forecast(lab, lab.capacities, prompt=prompt, tokens=count, calibration=short,
                        recording=routing, progress=False)  # fmt: skip
        assert ("were calibrated" in told._facts()["beware"]) == (prompt + count > 68)


def test_a_tiny_model_is_calibrated_and_left_as_it_was(lab: moelab.Lab) -> None:
    lab.set_on_miss("drop")
    before = (lab.capacities, lab.policy, dict(lab.pins), lab.on_miss)
    try:
        found = calibrate(lab, lengths=(8, 24), limit_seconds=0.01, progress=False)
        assert (lab.capacities, lab.policy, dict(lab.pins), lab.on_miss) == before
    finally:
        lab.set_on_miss("load")
    assert found.fingerprint == lab.fingerprint and found.layers == len(lab.sites)
    for parts in (found.decode, found.prefill, found.whole_decode, found.whole_prefill):
        assert parts is not None
        assert all(value >= 0 for value in parts.values()) and sum(parts.values()) > 0
    # The limit was over at once: one round of two lengths at each capacity.
    assert found.observations["prefill"] <= 2 * 2 * 2
    told = [
        forecast(lab, 3, prompt=10, tokens=4, recording=made, calibration=found, progress=False)
        for made in [moelab.record_texts(lab, ["a b c d e f g h i j k l m n o p q r s t"] * 2,
                                         prefix=10, tokens=6, progress=False)] * 2
    ]  # fmt: skip
    assert told[0].tokens_per_second == told[1].tokens_per_second
    assert math.isfinite(told[0].tokens_per_second) and told[0].first_token_seconds > 0
    assert "3 of" in repr(told[0]) and "<table>" in told[0]._repr_html_()


def test_bad_input_to_a_forecast_is_refused(lab: moelab.Lab) -> None:
    c = hand_made(fingerprint=lab.fingerprint)
    frame = made_up([9])
    wrong: list[Any] = [0, -3, True, 2.5]
    for bad in wrong:
        with pytest.raises(StudyError, match="prompt counts tokens"):
            forecast(lab, 4, prompt=bad, recording=frame, calibration=c)
        with pytest.raises(StudyError, match="tokens counts tokens"):
            forecast(lab, 4, prompt=2, tokens=bad, recording=frame, calibration=c)
    with pytest.raises(StudyError, match="prompt is empty"):
        forecast(lab, 4, prompt="  ", recording=frame, calibration=c)
    with pytest.raises(StudyError, match="'warm' or 'cold'"):
        forecast(lab, 4, prompt=2, recording=frame, calibration=c, page_cache="hot")
    with pytest.raises(CapacityError, match="top-k"):
        forecast(lab, 1, prompt=2, recording=frame, calibration=c)
    with pytest.raises(StudyError, match="is of hand"):
        forecast(lab, 4, prompt=2, recording=frame, calibration=hand_made())
    with pytest.raises(PolicyError, match="no policy 'lur'"):  # before anything is calibrated
        forecast(lab, 4, "lur", prompt=900, recording=frame)
    with pytest.raises(StudyError, match="recording= is"):
        forecast(lab, 4, prompt=2, recording=[1, 2], calibration=c)
    other = dataclasses.make_dataclass("Other", ["run", "routing"])
    with pytest.raises(StudyError, match="The recording is of x"):
        forecast(lab, 4, prompt=2, calibration=c,
                 recording=other({"fingerprint": "0", "model": "x"}, frame))  # fmt: skip
    for lengths in ((4,), (1, 9), (4, 4), (True, 9)):
        with pytest.raises(StudyError, match="lengths"):
            calibrate(lab, lengths=lengths)
    with pytest.raises(StudyError, match="limit_seconds"):
        calibrate(lab, limit_seconds=0)
    with lab.record(), pytest.raises(StudyError, match="being recorded"):
        forecast(lab, 4, prompt=2, recording=frame, calibration=c)


def test_the_bench_compares_forecasts_with_live_runs(
    lab: moelab.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelab.bench.forecast.bench_folder", lambda *_: lab.path)
    found = bench_forecast("named", rounds=2, shares=(0.5,), policies=("lru",), lengths=(6, 9),
                           tokens=4, limit_seconds=0.01, progress=False)  # fmt: skip
    assert [(r.what, r.prompt) for r in found.rows] == [
        ("first token", 6), ("decode", 6), ("first token", 9), ("decode", 9)
    ]  # fmt: skip
    assert all(r.low <= r.measured <= r.high and r.predicted > 0 for r in found.rows)
    found.save(tmp_path)
    assert "median error, decode" in (tmp_path / "bench-forecast.md").read_text()
    saved = json.loads((tmp_path / "bench-forecast.json").read_text())
    assert len(saved["rows"]) == 4
    assert saved["model"] == saved["calibration"]["model"] == "named", "and not its folder"
    from moelab.plots.study import forecast as draw

    assert draw(found.frame("decode")).get_ylabel() == "predicted, tokens/s"


def test_errors_are_shares_of_what_was_measured() -> None:
    def row(what: str, predicted: float, measured: float) -> ForecastRow:
        return ForecastRow(0.5, 4, "lru", 8, what, predicted, measured, 1, 2, 3, 4)

    rows = [row("decode", 12, 10), row("decode", 10, 10), row("decode", 5, 10),
            row("first token", 1, 4)]  # fmt: skip
    result = ForecastResult("m", 1, 0, 4, rows, {}, None, {})  # type: ignore[arg-type]
    assert result.median_error("decode") == pytest.approx(0.2)
    assert result.median_error("first token") == pytest.approx(0.75)
    assert result.median_error() == pytest.approx(0.35)
