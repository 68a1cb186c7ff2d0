"""Recordings of texts: the full model's routing, a run a text, whatever the lab does on a miss."""

from __future__ import annotations

import pytest

import moelab
from moelab.errors import StudyError
from moelab.lab import Lab

TEXTS = [
    {"text": "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n", "id": "a",
     "domain": "python"},
    {"text": "List the files in a folder with `ls`, and remove one of them with `rm`.", "id": "b",
     "domain": "shell"},
]  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Lab:
    return moelab.load("lab", 32, on_miss="drop")


def test_runs_have_their_text_and_domain(lab: Lab) -> None:
    found = moelab.record_texts(lab, TEXTS, prefix=6, tokens=5, progress=False)
    assert found.documents["document"].tolist() == ["a", "b"]
    routing = found.routing
    assert set(zip(routing["run"], routing["domain"], routing["document"], strict=True)) == {
        (0, "python", "a"), (1, "shell", "b")
    }  # fmt: skip
    tokens = found.tokens.groupby(["run", "phase"], observed=True).size()
    assert tokens.to_dict() == {
        (0, "prefill"): 6, (0, "decode"): 5, (1, "prefill"): 6, (1, "decode"): 5
    }  # fmt: skip
    assert "run" not in repr(found) and "2 in 2 domains" in repr(found)


def test_routing_is_the_full_model_s_and_the_lab_is_left_as_it_was(lab: Lab) -> None:
    found = moelab.record_texts(lab, TEXTS, prefix=6, tokens=5, progress=False).routing
    assert lab.on_miss == "drop"
    with moelab.load("lab", 1.0) as full:
        same = moelab.record_texts(full, TEXTS, prefix=6, tokens=5, progress=False).routing
    for name in ("run", "position", "token_id", "layer", "rank", "expert", "weight"):
        assert (found[name] == same[name]).all(), name
    lossy = found["outcome"].astype(str).unique()
    assert set(lossy) <= {"hit", "load"}


def test_steps_are_a_prefix_and_single_tokens(lab: Lab) -> None:
    routing = moelab.record_texts(lab, TEXTS, prefix=6, tokens=5, progress=False).routing
    sizes = routing[routing["run"] == 0].groupby("step")["position"].nunique()
    assert sizes.tolist() == [6, 1, 1, 1, 1, 1]


def test_texts_that_are_too_short_are_named(lab: Lab) -> None:
    with pytest.raises(StudyError, match="'b'"):
        moelab.record_texts(lab, TEXTS, prefix=25, tokens=5, progress=False)
