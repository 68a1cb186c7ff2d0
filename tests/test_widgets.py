"""Widgets by their traits and callbacks: no browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import traitlets

import moelab
from moelab.errors import SchemaError, StudyError
from moelab.lab import Lab
from moelab.routing.columns import typed
from moelab.routing.loop import PHASES
from moelab.widgets import Explorer, explorer, live
from moelab.widgets.live_panel import forks_at
from moelab.widgets.passage import Passage, shown
from moelab.widgets.render import shades, text_html

TEXTS = ["<b>", " word", "\n", "&amp;", "\ttab", "", "a\nb", "\x07", '"quoted"', "é"]
LAYERS, EXPERTS, TOP_K = (1, 3), 8, 2


def recorded(count: int = 40, *, padding: bool = True, stock_token: bool = False) -> Any:
    """A recording's frames: a chunk of ten tokens, then one at a time; two runs."""
    random = np.random.default_rng(3)
    keys: dict[str, list[int]] = {k: [] for k in ("run", "sequence", "step", "position")}
    phases = []
    for token in range(count):
        run, place = divmod(token, count // 2)
        keys["run"].append(run)
        keys["sequence"].append(0)
        keys["step"].append(max(place - 9, 0))
        keys["position"].append(place)
        phase = "padding" if padding and token == 5 else "prefill" if place < 10 else "decode"
        phases.append(PHASES.index(phase))
    vocabulary = sorted(set(TEXTS))
    codes = np.array([vocabulary.index(TEXTS[t % len(TEXTS)]) for t in range(count)], np.int32)
    rows = [
        (token, layer, rank, expert)
        for token in range(count)
        for layer in LAYERS
        if not (stock_token and token == 7)
        for rank, expert in enumerate(random.permutation(EXPERTS)[:TOP_K])
    ]
    # In a chunk a layer comes after the other: a token's slots are not side by side.
    rows.sort(key=lambda r: (keys["run"][r[0]], keys["step"][r[0]], r[1]))
    at = np.array([r[0] for r in rows])
    weight = np.array([0.7 if r[2] == 0 else 0.3 for r in rows], np.float32)
    hit = random.random(len(rows)) < 0.6
    shared = {k: np.array(v) for k, v in keys.items()}
    routing = typed(
        "routing",
        {
            **{k: v[at] for k, v in shared.items()},
            "token_id": codes[at], "token": codes[at], "phase": np.array(phases)[at],
            "layer": [r[1] for r in rows], "rank": [r[2] for r in rows],
            "expert": [r[3] for r in rows], "weight": weight, "hit": hit,
            "outcome": np.where(hit, 0, 1), "computed": [r[3] for r in rows], "applied": weight,
        },
        vocabulary,
    )  # fmt: skip
    tokens = typed(
        "tokens",
        {
            **shared, "token_id": codes, "token": codes, "phase": np.array(phases),
            "logprob": np.where(np.arange(count) % 3 == 0, np.nan, -np.arange(count) / 10),
            "entropy": np.full(count, np.nan), "hits": np.bincount(at, hit, count),
            "misses": np.bincount(at, ~hit, count), "bytes_read": np.zeros(count),
            "seconds": np.zeros(count),
        },
        vocabulary,
    )  # fmt: skip
    return SimpleNamespace(tokens=tokens, routing=routing)


class Read(HTMLParser):
    """What a browser would show of HTML, and which tags it would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", []  # type: str, list[str]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


# -- the passage -----------------------------------------------------------------------------


def test_each_token_has_its_own_slots() -> None:
    recording = recorded()
    passage = Passage(recording)
    keys = ["run", "sequence", "step", "position"]
    assert len(passage) == 39, "padding is no text"
    for token in range(len(passage)):
        row = passage.tokens.iloc[token]
        mine = (recording.routing[keys] == row[keys].to_numpy()).all(axis=1)
        expected = recording.routing[mine].sort_values(["layer", "rank"])
        found = passage.slots(token)
        for column in ("layer", "rank", "expert", "weight", "hit"):
            assert found[column].tolist() == expected[column].tolist()
        assert len(found) == 4


def test_a_token_without_routed_slots_has_none() -> None:
    passage = Passage(recorded(padding=False, stock_token=True))
    sizes = [len(passage.slots(token)) for token in range(len(passage))]
    assert sizes == [0 if token == 7 else 4 for token in range(40)]


def test_tokens_of_an_expert_are_those_that_chose_it() -> None:
    passage = Passage(recorded())
    found = passage.tokens_of(3, 2)
    expected = [
        token
        for token in range(len(passage))
        if ((passage.slots(token)["layer"] == 3) & (passage.slots(token)["expert"] == 2)).any()
    ]
    assert found["token"].tolist() == expected
    assert found["text"].tolist() == [passage.texts[token] for token in expected]
    assert passage.uses(3)[2] == len(expected)


def test_colours_are_the_figures_that_they_say() -> None:
    passage = Passage(recorded())
    for token in range(len(passage)):
        slots, row = passage.slots(token), passage.tokens.iloc[token]
        weight = slots["weight"].astype(float)
        missed = weight[~slots["hit"]].sum() / weight.sum()
        assert passage.values("hit rate")[token] == pytest.approx(slots["hit"].mean())
        assert passage.values("missed mass")[token] == pytest.approx(missed)
        assert passage.values("surprise")[token] == pytest.approx(-row["logprob"], nan_ok=True)
    mine = passage.values("expert's weight", 3, 2)
    found = passage.tokens_of(3, 2)
    np.testing.assert_allclose(mine[found["token"]], found["weight"])
    assert np.isnan(np.delete(mine, found["token"])).all()
    with pytest.raises(StudyError, match="hit rate"):
        passage.values("mood")


def test_a_recording_that_lacks_a_column_or_tokens() -> None:
    recording = recorded()
    lacking = SimpleNamespace(
        tokens=recording.tokens, routing=recording.routing.drop(columns="weight")
    )
    with pytest.raises(SchemaError, match="'weight'"):
        Explorer(lacking)
    empty = SimpleNamespace(tokens=recording.tokens.iloc[:0], routing=recording.routing.iloc[:0])
    with pytest.raises(StudyError, match="no tokens"):
        Explorer(empty)


def test_a_long_recording_is_cut_and_says_so() -> None:
    view = explorer(recorded(), limit=25, page_size=10)
    assert len(view.passage) == 25
    assert view.pages == 3
    assert len(view.buttons) == 10
    assert "14 more are left out" in view._place.value


@pytest.mark.parametrize(
    ("text", "seen"),
    [("a b", "a b"), ("\n\n", "⏎⏎"), ("\r\n", "⏎"), ("\t", "⇥"), ("", "∅"), ("\x07", "\\x07"),
     ("<b>", "<b>"), ("é…", "é…")],
)  # fmt: skip
def test_all_of_a_token_is_seen(text: str, seen: str) -> None:
    assert shown(text) == seen


def test_text_is_escaped_and_complete() -> None:
    html = text_html(TEXTS, [0] * len(TEXTS), titles=['<"'] * len(TEXTS), chosen=1, marked={0})
    read = Read(html)
    assert set(read.tags) == {"div", "span"}
    assert re.sub("\n", "", read.text) == "".join(shown(text) for text in TEXTS)
    assert read.text.count("\n") == 2, "lines break where the text's do"


def test_the_scale_is_from_low_to_high_and_leaves_gaps_out() -> None:
    steps, (low, high) = shades(np.array([0.0, 0.5, 1.0, np.nan]))
    assert steps[0] == 0
    assert steps[0] < steps[1] < steps[2]
    assert steps[3] == -1
    assert (low, high) == (0, 1)
    assert shades(np.array([np.nan]))[0].tolist() == [-1]
    assert shades(np.array([2.0, 2.0]))[0].min() >= 0


# -- the explorer ----------------------------------------------------------------------------


@pytest.fixture
def view() -> Explorer:
    return explorer(recorded(), page_size=15)


def test_a_click_on_a_token_shows_its_experts(view: Explorer) -> None:
    before = view._token_panel.value
    view.buttons[3].click()
    assert view.token == 3
    panel = view._token_panel.value
    assert panel != before
    for row in view.passage.slots(3).itertuples():
        assert f"<b>{row.expert}</b>" in panel
    assert "token 4 of 39" in panel
    assert view.buttons[3].layout.border_top
    assert not view.buttons[4].layout.border_top
    view.buttons[4].click()
    assert view.token == 4
    assert not view.buttons[3].layout.border_top


def test_a_click_on_another_page_is_that_pages_token(view: Explorer) -> None:
    view.forth.click()
    assert view.page == 1
    view.buttons[2].click()
    assert view.token == 17
    view.token = 38
    assert view.page == 2
    assert view.forth.disabled
    assert len([c for c in view._text.children if c in view.buttons]) == 9
    view.back.click()
    view.back.click()
    assert view.page == 0
    assert view.back.disabled


def test_an_expert_marks_its_tokens(view: Explorer) -> None:
    view.layer_box.value = 3
    view.expert_box.value = 2
    assert (view.layer, view.expert) == (3, 2)
    marked = {p for p in range(15) if view.buttons[p].layout.border_bottom}
    chosen = view.passage.tokens_of(3, 2)["token"]
    assert marked == set(chosen[chosen < 15])
    assert marked
    assert f"chosen by {len(chosen)} of 39" in view._expert_panel.value
    view.expert_box.value = -1
    assert view.expert_box.value == -1
    assert not any(b.layout.border_bottom for b in view.buttons)


def test_an_expert_that_no_token_chose_can_be_picked(view: Explorer) -> None:
    view.expert = 999
    assert "no token chose it" in view._expert_panel.value
    assert view.onward.disabled


def test_another_layer_means_another_expert(view: Explorer) -> None:
    view.expert = 2
    view.layer = 3
    assert view.trait_values()["expert"] is None
    options = dict(view.expert_box.options)
    assert sorted(options.values()) == [-1, *sorted(view.passage.uses(3).index)]


def test_a_tokens_experts_are_shortcuts(view: Explorer) -> None:
    view.token = 2
    shortcut = view.shortcuts.children[1]
    shortcut.click()
    slots = view.passage.slots(2)
    first = slots.loc[slots["layer"] == view.layer, "expert"].iloc[0]
    assert view.expert == first
    assert shortcut.description == str(first)
    assert view.expert_box.value == first


def test_the_next_page_with_an_expert(view: Explorer) -> None:
    pages: dict[int, set[int]] = {}
    for expert in view.passage.uses(view.layer).index:
        found = view.passage.tokens_of(view.layer, expert)["token"] // 15
        pages[int(expert)] = set(found)
    expert = next(e for e, of in pages.items() if 2 in of)
    view.expert = expert
    view.page = 1
    view.onward.click()
    assert view.page == 2
    view.onward.click()
    assert view.page == min(pages[expert]), "and from the start again"


def test_colours_change_with_what_they_stand_for(view: Explorer) -> None:
    before = [b.style for b in view.buttons]
    view.colour_by.value = "surprise"
    assert view.colour == "surprise"
    assert [b.style for b in view.buttons] != before
    assert view.buttons[0].style is view._plain, "no log-probability, no colour"
    assert "log-probability" in view._legend.value
    view.colour = "expert's weight"
    assert all(b.style is view._plain for b in view.buttons)
    view.expert = int(view.passage.uses(view.layer).index[0])
    assert any(b.style is not view._plain for b in view.buttons)
    assert f"expert {view.expert}" in view._legend.value


def test_a_button_shows_its_token_without_losing_spaces(view: Explorer) -> None:
    texts = [b.description for b in view.buttons[:4]]
    assert texts == ["<b>", "\u00a0word", "⏎", "&amp;"]


def test_what_is_not_there_cannot_be_picked(view: Explorer) -> None:
    for name, value in {"token": 39, "page": 3, "layer": 2, "colour": "mood"}.items():
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, value)
    with pytest.raises(StudyError, match="colour"):
        explorer(recorded(), colour="mood")
    with pytest.raises(StudyError, match="page_size"):
        explorer(recorded(), page_size=0)


def test_the_static_view_says_the_same(view: Explorer) -> None:
    view.token = 3
    view.expert = int(view.passage.slots(3)["expert"].iloc[0])
    static = view.static()
    read = Read(static._repr_html_())
    assert "script" not in read.tags
    assert "input" not in read.tags
    for text in view.passage.texts[:15]:
        assert shown(text) in read.text
    assert "token 4 of 39" in read.text
    assert f"expert {view.expert} of layer 1" in read.text
    assert str(static) == static._repr_html_()
    assert "HTML" in repr(static)


def test_the_pictures_say_the_same(view: Explorer) -> None:
    import matplotlib.pyplot as plt

    with pytest.raises(StudyError, match="token"):
        view.plot_token()
    view.token = 3
    ids = [t.get_text().split()[0] for t in view.plot_token().texts]
    assert ids == [str(e) for e in view.passage.slots(3)["expert"]]
    letters = "".join(t.get_text() for t in view.plot_text().texts)
    assert letters == "".join(shown(text) for text in view.passage.texts[:15])
    plt.close("all")


# -- the live panel --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = moelab.load("lab", capacity=24, on_miss="substitute", swap_budget=2)
    yield lab
    lab.close()


def state(lab: Lab) -> tuple[Any, ...]:
    return list(lab.capacities), lab.miss_action, lab.swap_budget, lab.budget, list(lab.sessions)


def test_two_runs_stand_side_by_side_and_the_lab_is_as_it_was(lab: Lab) -> None:
    before = state(lab)
    panel = live(lab, prompt="List the <files>", capacity=12, on_miss="drop", max_tokens=8)
    watched = []
    panel.observe(lambda change: watched.append(panel.run_button.disabled), "busy")
    panel.run_button.click()
    assert watched == [True, False], "no second run meanwhile"
    assert state(lab) == before
    assert not panel.busy
    assert not panel.prompt.disabled
    assert panel.cancel_button.disabled

    lab.set_on_miss("load")
    exact = [r.token for r in lab.stream("List the <files>", 8, temperature=0)]
    lab.resize(12)
    lab.set_on_miss("drop")
    other = [r.token for r in lab.stream("List the <files>", 8, temperature=0)]
    lab.resize(24)
    lab.set_on_miss("substitute")
    assert panel.exact.tokens == exact
    assert panel.other.tokens == other
    assert panel.fork == forks_at(exact, other)
    assert panel.fork is not None
    assert f"part at token {panel.fork + 1}" in panel.message.value
    assert 0 < panel.other.hits < panel.other.routed
    assert "tokens/s" in panel.exact.facts
    read = Read(str(panel.static()))
    assert "script" not in read.tags
    assert "List the <files>" in read.text
    assert "drop at 12 experts a layer" in read.text


def test_load_beside_the_exact_run_is_the_same(lab: Lab) -> None:
    panel = live(lab, prompt="Hello", capacity=8, on_miss="load", max_tokens=4)
    panel.run()
    assert panel.fork is None
    assert "the same" in panel.message.value


def test_cancel_ends_between_tokens_and_restores(lab: Lab) -> None:
    before = state(lab)
    panel = live(lab, prompt="Hello", capacity=12, max_tokens=20)
    steps = panel._steps()
    next(steps)
    next(steps)
    assert panel.busy
    assert panel.run_button.disabled
    panel.cancel_button.click()
    assert list(steps) == []
    assert len(panel.exact.tokens) == 2
    assert panel.other.tokens == []
    assert "cancelled" in panel.message.value
    assert state(lab) == before
    assert not panel.busy


def test_a_run_that_is_thrown_away_restores(lab: Lab) -> None:
    before = state(lab)
    panel = live(lab, prompt="Hello", capacity=12, max_tokens=20)
    steps = panel._steps()
    next(steps)
    steps.close()
    assert state(lab) == before
    assert not panel.busy


def test_an_interrupt_restores(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(lab)
    panel = live(lab, prompt="Hello", capacity=12, max_tokens=20)

    def interrupted() -> None:
        if len(panel.exact.tokens) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(panel, "_show", interrupted)
    panel.run()
    assert "interrupted" in panel.message.value
    assert state(lab) == before
    assert not panel.busy


def test_in_a_running_loop_cancel_is_heard_between_tokens(lab: Lab) -> None:
    import asyncio

    before = state(lab)
    panel = live(lab, prompt="Hello", capacity=12, max_tokens=60)

    async def pressed() -> None:
        panel.run_button.click()
        assert not panel.exact.tokens, "the click returns at once"
        while not panel.exact.tokens:
            await asyncio.sleep(0.01)
        panel.cancel_button.click()
        await panel._task

    asyncio.run(pressed())
    assert 0 < len(panel.exact.tokens) < 60
    assert "cancelled" in panel.message.value
    assert state(lab) == before


def test_what_cannot_run_is_said_and_not_raised(lab: Lab) -> None:
    before = state(lab)
    panel = live(lab, prompt="", capacity=12, max_tokens=4)
    panel.run_button.click()
    assert panel.message.value
    assert not panel.busy
    assert state(lab) == before
    with lab.record():
        panel.run_button.click()
    assert "record" in panel.message.value
    with pytest.raises(StudyError, match="capacity"):
        live(lab, capacity=65)
    with pytest.raises(StudyError, match="on_miss"):
        live(lab, on_miss="guess")


def test_a_closed_lab_is_said(lab_path: Any) -> None:
    other = moelab.load("lab", capacity=12)
    panel = live(other)
    other.close()
    panel.run_button.click()
    assert "closed" in panel.message.value
    assert not panel.busy


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [2], 0)],
)
def test_where_two_texts_part(first: list[int], second: list[int], place: int | None) -> None:
    assert forks_at(first, second) == place


def test_a_real_recording_can_be_explored(lab: Lab) -> None:
    with lab.record() as recording:
        lab.generate("Hello there", 6, temperature=0)
    view = explorer(recording)
    view.token = len(view.passage) - 1
    assert len(view.passage) == len(recording.tokens)
    assert len(view.passage.slots(view.token)) == 8 * 6
    assert isinstance(view.passage.uses(0), pd.Series)
