"""Pins of one domain judged on another: equal to the replay and to brute force; harm is named."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.errors import PinsError, PolicyError, StudyError
from moelab.quality.recorded import RecordedTexts, record_texts
from moelab.routing.recording import Recording
from moelab.study.drawn import drawn_pins
from moelab.study.pin_transfer import PinTransfer, pin_transfer
from tests.support import tiny
from tests.test_misses import folder

WORDS = {
    "words": "some plain words on page {} that say {} little of what was seen on day {} there",
    "digits": "{} 1415 9265 3589 7932 3846 {} 2643 3832 7950 2884 1971 {} 6939 9375 1058 2097 4944",
}


def texts(start: int, count: int = 3) -> list[dict[str, str]]:
    return [
        {"id": f"{domain}-{i}", "domain": domain, "text": form.format(i * 37, i * 11 + 3, i + 5)}
        for domain, form in WORDS.items()
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def recorded() -> tuple[RecordedTexts, RecordedTexts]:
    with moelab.load(folder("olmoe"), 6) as lab:
        options: dict[str, Any] = {"prefix": 12, "tokens": 20, "progress": False}
        return record_texts(lab, texts(0), **options), record_texts(lab, texts(3), **options)


@pytest.fixture(scope="module", params=["lru", "lfru"])
def found(recorded: tuple[RecordedTexts, RecordedTexts], request: Any) -> PinTransfer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pin_transfer(
            None, 7, top=3, policy=request.param, calibration=recorded[0], test=recorded[1]
        )


def test_hits_are_those_of_the_replay(
    recorded: tuple[RecordedTexts, RecordedTexts], found: PinTransfer
) -> None:
    learned, judged = recorded
    policy = found.frame["policy"].iloc[0]
    routing = judged.recording.routing
    run_of = judged.documents.set_index("document")["run"]
    experts, _ = tiny.experts("olmoe")

    def hits(document: str, pins: Any) -> tuple[int, int]:
        mine = routing[routing["run"] == run_of[document]]
        told = moelab.replay(mine, policy, capacity=7, pins=pins, experts=experts).routing
        decoded = told[told["phase"] == "decode"]
        return int(decoded["hit"].sum()), len(decoded)

    sizes = dict.fromkeys(tiny.moe_layers("olmoe"), experts)
    drawn = [drawn_pins(sizes, 3, seed) for seed in range(5)]
    for row in found.documents.iloc[::4].itertuples():
        assert (row.hits, row.slots) == hits(row.document, found.pins[row.train])
        assert row.hits_unpinned == hits(row.document, None)[0]
        by_chance = [hits(row.document, one)[0] for one in drawn]
        assert row.hits_random == pytest.approx(np.mean(by_chance))
    assert len(found.documents) == 3 * 6
    # The pins are the most used experts of the domain's calibration texts.
    digits = learned.routing[learned.routing["domain"] == "digits"]
    counts = Counter(zip(digits["layer"], digits["expert"], strict=True))
    for layer, pins in found.pins["digits"].items():
        order = sorted(range(experts), key=lambda e, n=layer: (-counts[n, e], e))  # type: ignore[misc]
        assert pins == sorted(order[:3])


def lru_hits(events: list[list[int]], capacity: int, pins: list[int]) -> int:
    """Brute force: hits of all events but the first; no event is larger than the bank."""
    last: dict[int, int] = {}
    inside = set(pins)
    hits = 0
    for now, needed in enumerate(events):
        hits += sum(e in inside for e in needed) if now else 0
        for e in needed:
            last[e] = now
        misses = [e for e in needed if e not in inside]
        while len(inside) + len(misses) > capacity:
            able = [e for e in inside if e not in pins and e not in needed]
            # Within an event recency is renewed in ascending id.
            inside.remove(min(able, key=lambda e: (last[e], e)))
        inside |= set(misses)
    return hits


def synthetic(
    groups: dict[str, list[list[list[int]]]], start: int = 0, experts: int = 16
) -> RecordedTexts:
    """A recording of one layer: by domain, texts of events of distinct experts."""
    rows, names = [], []
    run = 0
    for domain, documents in groups.items():
        for events in documents:
            names.append({"run": run, "document": f"{domain}-{start + run}", "domain": domain})
            for step, needed in enumerate(events):
                phase = "decode" if step else "prefill"
                rows += [(run, step, 0, rank, expert, phase) for rank, expert in enumerate(needed)]
            run += 1
    columns = ["run", "step", "layer", "rank", "expert", "phase"]
    frame = pd.DataFrame(rows, columns=columns).assign(weight=0.5, sequence=0, position=0)
    manifest = {
        "model": "made up", "fingerprint": "0" * 16, "layers": [0], "experts": [experts],
        "top_k": [2], "capacity": 8, "on_miss": "load",
    }  # fmt: skip
    recording = Recording(manifest, lambda table: frame)
    recording.complete()
    return RecordedTexts(recording, pd.DataFrame(names))


def events(random: np.random.Generator, favourites: list[int], count: int = 60) -> list[list[int]]:
    """Two experts an event: mostly a favourite, and one of the others, which come again soon."""
    others = [e for e in range(16) if e not in favourites]
    recent = random.choice(others, 3, replace=False).tolist()
    found = []
    for _ in range(count):
        if random.random() < 0.15:
            recent[int(random.integers(3))] = int(random.choice(others))
        found.append(sorted({int(random.choice(favourites)), int(random.choice(recent))}))
    return found


@pytest.fixture(scope="module")
def opposed() -> tuple[RecordedTexts, RecordedTexts]:
    """Two domains with other favourites, so that each one's pins are dead weight on the other."""
    random = np.random.default_rng(0)
    favourites = {"a": [0, 1, 2, 3], "b": [12, 13, 14, 15]}

    def made(start: int) -> RecordedTexts:
        return synthetic(
            {d: [events(random, f) for _ in range(6)] for d, f in favourites.items()}, start
        )

    return made(0), made(100)


def test_brute_force_and_the_warning(opposed: tuple[RecordedTexts, RecordedTexts]) -> None:
    learned, judged = opposed
    with pytest.warns(UserWarning, match=r"a → b −?[-\d.]+ points"):
        found = pin_transfer(None, 7, top=4, calibration=learned, test=judged, random=3)
    routing = judged.recording.routing
    for row in found.documents.itertuples():
        run = int(judged.documents.set_index("document").loc[row.document, "run"])
        mine = routing[routing["run"] == run]
        needed = [part["expert"].tolist() for _, part in mine.groupby("step")]
        assert row.hits == lru_hits(needed, 7, found.pins[row.train][0])
        assert row.hits_unpinned == lru_hits(needed, 7, [])
    frame = found.frame.set_index(["train", "test"])
    for own, other in (("a", "b"), ("b", "a")):
        assert frame.loc[(own, other), "high"] < 0 and frame.loc[(own, other), "worse"]
        assert not frame.loc[(own, own), "worse"]
        assert frame.loc[(own, own), "gain"] > frame.loc[(own, other), "gain"] + 0.1
        assert frame.loc[(own, own), "over_low"] > 0
    assert found.warning is not None and found.warning in repr(found)
    assert "<table>" in found._repr_html_() and "7" in found.statement
    assert found.summary["pins"].tolist() == [
        "own domain", "other domains", "all domains", "random"
    ]  # fmt: skip
    ax = found.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "all"]


def test_gains_are_differences_of_hit_rates(found: PinTransfer) -> None:
    frame = found.frame
    assert len(frame) == 3 * 2 and (frame["documents"] == 3).all()
    difference = frame["hit_rate"] - frame["hit_rate_unpinned"]
    np.testing.assert_allclose(frame["gain"], difference)
    np.testing.assert_allclose(frame["gain"] - frame["gain_random"], frame["over_random"])
    assert (frame["low"] <= frame["gain"]).all() and (frame["gain"] <= frame["high"]).all()
    rows = found.documents
    own = rows[rows["train"] == rows["test"]]
    summary = found.summary.set_index("pins")
    assert summary.loc["own domain", "gain"] == pytest.approx(
        (own["hits"] - own["hits_unpinned"]).sum() / own["slots"].sum()
    )
    once = rows[rows["train"] == "all"]
    assert summary.loc["random", "gain"] == pytest.approx(
        (once["hits_random"] - once["hits_unpinned"]).sum() / once["slots"].sum()
    )


def test_with_a_model() -> None:
    with moelab.load(folder("olmoe"), 6) as lab, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        options: dict[str, Any] = {"prefix": 8, "tokens": 12, "random": 0}
        found = pin_transfer(lab, 9, calibration=texts(0, 2), test=texts(2, 2), **options)
        assert lab.on_miss == "load"
    _, top_k = tiny.experts("olmoe")
    assert (found.frame["top"] == (9 - top_k) // 2).all()
    assert found.frame["gain_random"].isna().all() and found.frame["over_random"].isna().all()


def test_bad_input(opposed: tuple[RecordedTexts, RecordedTexts]) -> None:
    learned, judged = opposed
    given: dict[str, Any] = {"calibration": learned, "test": judged}
    for capacity, options, error, told in (
        (2, {}, StudyError, "above 2"),
        (16, {}, StudyError, "below 16"),
        (0.5, {}, StudyError, "capacity counts experts"),
        (7, {"top": 6}, PinsError, "1 too many"),
        (7, {"top": 0}, PinsError, "from 1 on"),
        (7, {"random": -1}, StudyError, "drawn pin sets"),
        (7, {"policy": "min"}, StudyError, "knows the future"),
        (7, {"policy": "mru"}, PolicyError, "no policy 'mru'"),
        (7, {"test": learned}, StudyError, "in both splits"),
        (7, {"test": None}, StudyError, "Without a model"),
        (7, {"test": synthetic({"a": [[[0, 1], [2, 3]]]}, 900)}, StudyError, "1 test document"),
    ):
        with pytest.raises(error, match=told):
            pin_transfer(None, capacity, **{**given, **options})  # type: ignore[arg-type]
    other = synthetic({"a": [[[0, 1], [2, 3]]] * 2}, 900)
    other.recording.run["fingerprint"] = "1" * 16
    with pytest.raises(StudyError, match="two models"):
        pin_transfer(None, 7, **{**given, "test": other})
    no_decode = synthetic({"a": [[[0, 1]]] * 2}, 900)
    with pytest.raises(StudyError, match="no decoded token"):
        pin_transfer(None, 7, **{**given, "test": no_decode})
