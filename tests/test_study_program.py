"""`moelab study`: parts that are done once, a page of findings, and lessons over trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.cli import main
from moelab.errors import StudyError
from moelab.study.program import quality, run
from moelab.study.program.notes import Notes
from moelab.study.program.plan import SCALES, Scale, capacities, scale_of, texts_for

SMALL = Scale("small", 2, (0.25,), prefix=6, tokens=3, record_tokens=8, permutations=3)


@pytest.fixture(scope="module")
def lab() -> Any:
    with moelab.load("lab", 0.5) as lab:
        yield lab


def test_a_part_is_run_once_and_what_it_found_is_on_disk(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run.study(lab, out=tmp_path, scale=SMALL, only=["pins"])
    assert {"findings.md", "lessons.csv", "pins.csv", "pins.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    page = (tmp_path / "findings.md").read_text(encoding="utf-8")
    assert "## Do pins help, and for whom?" in page and lab.fingerprint in page
    assert "12 pins" not in page and "5 pins a layer at capacity 16" in page
    summary = pd.read_csv(tmp_path / "pins-summary.csv")
    own = summary.query("pins == 'own domain' and policy == 'lru' and capacity == 16").iloc[0]
    lesson = found.lessons.set_index("key").loc["pins-own domain-16"]
    assert lesson["value"] == pytest.approx(own["gain"], rel=1e-4)
    other = summary.query("pins == 'other domains' and policy == 'lru'").iloc[0]
    harm = found.lessons.set_index("key").loc["pins-other domains-16"]
    assert (harm["value"], harm["low"], harm["high"]) == pytest.approx(
        (-other["gain"], -other["high"], -other["low"]), rel=1e-4
    )
    assert "Study" in repr(found)

    def fails(notes: Notes) -> None:
        raise AssertionError("this part was finished")

    monkeypatch.setattr(run, "PARTS", {**run.PARTS, "pins": fails})
    again = run.study(lab, out=tmp_path, scale=SMALL, only=["pins"])
    pd.testing.assert_frame_equal(again.lessons, found.lessons)
    with pytest.raises(AssertionError):  # of another scale, it was not
        run.study(lab, out=tmp_path, scale="tiny", only=["pins"])
    with pytest.raises(AssertionError):
        run.study(lab, out=tmp_path, scale=SMALL, only=["pins"], again=True)


def test_what_an_unfinished_part_noted_is_forgotten(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(notes: Notes) -> None:
        notes.found("Why?", "half a truth")
        raise KeyboardInterrupt

    def works(notes: Notes) -> None:
        row = {"mean": 1.0, "low": 0.5, "high": 1.5}
        notes.lesson("one", "this is so", row, "nats")
        notes.frame("table", pd.DataFrame({"a": [1 / 3]}))

    monkeypatch.setattr(run, "PARTS", {"first": breaks, "second": works})
    with pytest.raises(KeyboardInterrupt):
        run.study(lab, out=tmp_path, scale=SMALL)
    found = run.study(lab, out=tmp_path, scale=SMALL, only=["second"])
    assert not found.findings and found.lessons["key"].tolist() == ["one"]
    assert (tmp_path / "table.csv").read_text() == "a\n0.333333\n"


def test_texts_are_long_enough_and_of_their_split(lab: Any) -> None:
    for split in ("calibration", "test"):
        texts = texts_for(lab, SMALL, split)
        assert len(texts) == 12 and all(f"-{split}-" in t["id"] or split in t["id"] for t in texts)
        assert min(len(lab.tokenizer.encode(t["text"])) for t in texts) >= 6 + 8 + 1
    assert capacities(lab, scale_of("full")) == [8, 16, 24, 32, 40, 48, 56]
    assert set(SCALES) == {"full", "signs", "tiny"}


def test_unknown_parts_and_scales(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="'pinz'"):
        run.study(lab, out=tmp_path, only=["pinz"])
    with pytest.raises(StudyError, match="full, signs, tiny"):
        run.study(lab, out=tmp_path, scale="huge")


def test_memory_that_holds_the_whole_model_is_no_budget(lab: Any, tmp_path: Path) -> None:
    found = moelab.sweep(
        lab, [16, 48], on_miss=["load", "drop", "low_bit", "substitute", "reroute"], prefix=6,
        tokens=2, split="test", prompts=texts_for(lab, SMALL, "test")[:4], progress=False,
    ).frame  # fmt: skip
    with moelab.load("lab", 1.0) as all_of_it:
        memory = all_of_it.memory()
    whole = memory.total + int(found["bytes_cache"].max())
    notes = Notes(lab, SMALL, tmp_path, "")
    assert quality._whole_bytes(notes, found) == whole
    assert (found.query("on_miss == 'low_bit' and capacity == 48")["bytes"] > whole).all()
    quality._same_memory(notes, found)
    table = pd.read_csv(tmp_path / "equal-bytes.csv")
    assert len(table) and (table["budget"] < whole).all()
    notes.close("small", 0.0)
    said = notes.read("small")["findings"][0].text
    assert f"{whole / 1e6:.1f} MB; `low_bit` takes as much or more from 48 experts on." in said


def test_the_first_layer_agrees_by_construction(lab: Any, tmp_path: Path) -> None:
    notes = Notes(lab, SMALL, tmp_path, "")
    quality._deeper(notes, "drop", pd.DataFrame({"agreement": [1.0, 0.8, 0.7, 0.9]}))
    quality._deeper(notes, "drop", pd.DataFrame({"agreement": [1.0, 0.8]}))
    notes.close("why", 0.0)
    (lesson,) = notes.read("why")["lessons"]
    assert lesson.value == pytest.approx(-0.1), "not the 0.1 that the first layer gives"


def test_how_far_shuffles_differ_is_no_interval_over_texts(lab: Any, tmp_path: Path) -> None:
    found = run.study(lab, out=tmp_path, scale=SMALL, only=["policies"]).lessons.set_index("key")
    assert (found.loc[["skew", "recency"], "value"] != 0).all()
    assert found.loc[["skew", "recency"], ["low", "high"]].isna().all(axis=None)
    assert found["low"]["lru-lfu"] <= found["value"]["lru-lfu"] <= found["high"]["lru-lfu"]


def lessons(folder: Path, rows: list[tuple[str, float, float, float]]) -> Path:
    folder.mkdir()
    frame = pd.DataFrame(rows, columns=["key", "value", "low", "high"])
    frame.insert(1, "statement", "so " + frame["key"])
    frame.assign(unit="nats").to_csv(folder / "lessons.csv", index=False)
    return folder


def test_a_lesson_counts_where_every_training_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = np.nan
    a = lessons(
        tmp_path / "a",
        [("sure", 1, 0.5, 2), ("weak", 1, -1, 2), ("split", 1, 0.5, 2), ("once", 1, 0.5, 2),
         ("bare", 1, nan, nan), ("zero", 0, 0, 0), ("false", -1, -2, -0.5)],
    )  # fmt: skip
    b = lessons(
        tmp_path / "b",
        [("sure", 2, 1, 3), ("weak", 2, 1, 3), ("split", -1, -2, -0.5), ("bare", 2, nan, nan),
         ("zero", 0, 0, 0), ("false", -3, -4, -2), ("new", 1, 0, 2)],
    )  # fmt: skip
    table = run.lessons_of([a, b]).set_index("key")
    assert table["same_sign"].to_dict() == {
        "sure": True, "weak": True, "split": False, "once": True, "bare": True,
        "zero": False, "false": True,
    }  # fmt: skip
    assert table["shown"].to_dict() == {
        "sure": True, "weak": False, "split": False, "once": True, "bare": False,
        "zero": False, "false": True,
    }  # fmt: skip
    assert main(["lessons", str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    page = capsys.readouterr().out
    assert "| so once | 1 | nan | nats | seen once |" in page
    assert "| so split | 1 | -1 | nats | no |" in page
    assert "| so sure | 1 | 2 | nats | yes, shown |" in page
    assert "| so weak | 1 | 2 | nats | yes |" in page
    assert "| so bare | 1 | 2 | nats | yes |" in page, "nobody knows how sure that is"
    assert "| so false | -1 | -3 | nats | no, the opposite, shown |" in page
    assert "4 of 7 keep their sign" in page
    assert (tmp_path / "out" / "lessons.md").read_text(encoding="utf-8") in page
    with pytest.raises(StudyError, match=r"lessons\.csv"):
        run.lessons_of([a, tmp_path])
    with pytest.raises(StudyError, match="No folder"):
        run.lessons_of([])


def test_a_lesson_of_other_words_or_without_a_figure_is_none(tmp_path: Path) -> None:
    a = lessons(tmp_path / "a", [("worse", 1, 0.5, 2), ("none", 1, 0.5, 2)])
    b = lessons(tmp_path / "b", [("worse", 1, 0.5, 2), ("none", np.nan, np.nan, np.nan)])
    table = pd.read_csv(b / "lessons.csv")
    table.loc[table["key"] == "worse", "statement"] = "so worse, at another capacity"
    table.to_csv(b / "lessons.csv", index=False)
    found = run.lessons_of([a, b]).set_index("key")
    assert found["trainings"].to_dict() == {"worse": 1, "none": 1}
    assert found["b"].isna().all() and found["statement"]["worse"] == "so worse"
