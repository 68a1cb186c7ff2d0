"""Pins: what a user may give, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab import Pins
from moelab.errors import PinsError, ProfileError
from moelab.experts.pins import check_room, resolve_pins, room, with_profile
from moelab.experts.profile import Profile, Use

MODEL = "0123456789abcdef"


def site(layer: int, experts: int, top_k: int = 2) -> Any:
    return SimpleNamespace(layer=layer, experts=experts, top_k=top_k)


SITES = [site(0, 8), site(2, 8, 3)]


def profile(prompts: dict[int, list[int]], counts: dict[int, list[int]] | None = None) -> Profile:
    """A profile of 10 prompts."""
    active = {layer: np.array(values) for layer, values in prompts.items()}
    used = {layer: np.array(v) for layer, v in (counts or prompts).items()}
    return Profile(
        "m", MODEL, {i: len(v) for i, v in active.items()}, dict.fromkeys(active, 2), 4,
        {"prefill": 4}, 10, active,
        (Use("all", "prefill", 10, 1000, used, {i: v / 2 for i, v in used.items()}, active),),
    )  # fmt: skip


PROFILE = profile(
    {0: [10, 5, 4, 0, 9, 1, 0, 0], 2: [5, 6, 7, 8, 9, 10, 0, 3]},
    {0: [11, 50, 4, 0, 90, 1, 0, 0], 2: [5, 6, 70, 8, 9, 10, 0, 3]},
)


def resolved(spec: Any, capacities: tuple[int, int] = (6, 7)) -> dict[int, set[int]]:
    pins = resolve_pins(spec, SITES, capacities, fingerprint=MODEL)
    assert list(pins) == [0, 2]
    assert all(isinstance(ids, frozenset) for ids in pins.values())
    assert all(type(expert) is int for ids in pins.values() for expert in ids)
    return {layer: set(ids) for layer, ids in pins.items()}


def test_by_hand() -> None:
    assert resolved(None) == {0: set(), 2: set()}
    assert resolved([]) == {0: set(), 2: set()}
    assert resolved({}) == {0: set(), 2: set()}
    assert resolved([1, 3, 1]) == {0: {1, 3}, 2: {1, 3}}
    assert resolved({2: [7], np.int64(0): range(2)}) == {0: {0, 1}, 2: {7}}
    assert resolved({2: np.array([1, 2], np.uint16)}) == {0: set(), 2: {1, 2}}
    assert resolved(frozenset({5})) == {0: {5}, 2: {5}}


def test_from_a_profile(tmp_path: Path) -> None:
    half = {0: {0, 1, 4}, 2: {0, 1, 2, 3, 4, 5}}
    assert resolved(Pins(PROFILE, share=0.5), (6, 8)) == half
    assert resolved(PROFILE, (6, 8)) == half
    path = PROFILE.save(tmp_path / "p.json")
    for given_path in (path, str(path)):
        assert resolved(given_path, (6, 8)) == half
        assert resolved(Pins(given_path, share=0.5), (6, 8)) == half
    assert resolved(Pins(PROFILE, share=1.0)) == {0: {0}, 2: {5}}
    assert resolved(Pins(PROFILE, share=0.7)) == {0: {0, 4}, 2: {2, 3, 4, 5}}
    assert resolved(Pins(PROFILE, top=2)) == {0: {4, 1}, 2: {2, 5}}, "by slots, not by prompts"
    assert resolved(Pins(PROFILE, top=0)) == {0: set(), 2: set()}


def test_the_profile_of_pins_is_read_once(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "p.json")
    for spec in (path, str(path), PROFILE, Pins(path, top=2)):
        read = with_profile(spec)
        assert isinstance(read, Pins) and isinstance(read.profile, Profile)
        assert read.profile.orders() == PROFILE.orders() == {
            0: [4, 1, 0, 2, 5, 3, 6, 7], 2: [2, 5, 4, 3, 1, 0, 7, 6]
        }  # fmt: skip
        assert (read.share, read.top) == ((None, 2) if isinstance(spec, Pins) else (0.5, None))
    assert with_profile(None) is None and with_profile([1]) == [1]


def test_those_that_fit() -> None:
    assert resolved(Pins(PROFILE, share=0.5, fit=True)) == {0: {0, 1, 4}, 2: {2, 3, 4, 5}}
    assert resolved(Pins(PROFILE, top=5, fit=True)) == {0: {4, 1, 0, 2}, 2: {2, 5, 4, 3}}
    assert resolved(Pins(PROFILE, share=0.5, fit=True), (2, 3)) == {0: set(), 2: set()}
    # A layer that holds all its experts has no slots to run short of.
    assert resolved(Pins(PROFILE, top=8), (8, 8)) == {0: set(range(8)), 2: set(range(8))}
    assert [room(SITES[1], c) for c in (3, 7, 8)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Pins(PROFILE, share=0.5), "6 pins in layer 2 are 2 too many: of its 7 slots 3 .* at most "
         "4 can be pinned. The smallest share that fits every layer is 0.601"),
        (Pins(PROFILE, top=5), "5 pins in layer 0 are 1 too many.*largest top that fits .* is 4"),
        (Pins(PROFILE, share=0), "8 pins in layer 0 are 4 too many"),
        ([0, 1, 2, 3, 4], "5 pins in layer 0 are 1 too many: .* Pin fewer, or hold more experts"),
        ({2: range(8)}, "8 pins in layer 2 are 4 too many"),
        ({1: [0]}, "pins name layer 1, and the model's MoE layers are 0, 2"),
        ({"0": [0]}, "pins name layer '0'"),
        ({True: [0]}, "pins name layer True"),
        ({0: [8]}, "expert 8 in layer 0, which has experts 0 to 7"),
        ([-1], "expert -1 in layer 0"),
        ([1.0], "ids \\(ints\\), got 1.0"),
        ({0: [True]}, "got True for layer 0"),
        ({0: 3}, "got 3 for layer 0"),
        ({0: "12"}, "got '12' for layer 0"),
        (3, "got 3"),
        (["a"], "got 'a'"),
    ],
)  # fmt: skip
def test_refused(spec: Any, message: str) -> None:
    with pytest.raises(PinsError, match=message) as caught:
        resolved(spec)
    assert isinstance(caught.value, ValueError)


def test_no_share_that_fits() -> None:
    crowded = profile({0: [10] * 8, 2: [10] * 8})
    with pytest.raises(PinsError, match=r"No share fits every layer.*Take top="):
        resolved(Pins(crowded, share=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "need either share= .* or top="),
        ({"share": 0.5, "top": 3}, "share=0.5 and top=3"),
        ({"share": 1.5}, "between 0 and 1, got 1.5"),
        ({"share": -0.1}, "got -0.1"),
        ({"share": float("nan")}, "got nan"),
        ({"share": True}, "got True"),
        ({"share": "half"}, "got 'half'"),
        ({"top": -1}, "int from 0 on, got -1"),
        ({"top": 2.0}, "got 2.0"),
        ({"top": True}, "got True"),
    ],
)
def test_a_wrong_choice(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PinsError, match=message):
        Pins(PROFILE, **options)


def test_another_model_s_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"fingerprint 0123456789abcdef.*has fingerprint other"):
        resolve_pins(Pins(PROFILE, top=1), SITES, (6, 7), fingerprint="other")
    with pytest.raises(ProfileError, match="cannot be read"):
        resolved(tmp_path / "none.json")


def test_layers_without_a_profile_have_no_pins(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"num_prompts": 2, "layers": {"2": {"activation_counts": {"1": 2, "4": 1}}}}')
    with pytest.warns(UserWarning, match="does not say which checkpoint"):
        assert resolved(path) == {0: set(), 2: {1, 4}}


def test_room_is_checked_again_for_another_capacity() -> None:
    pins = resolve_pins([0, 1, 2], SITES, (6, 7), fingerprint=MODEL)
    check_room(pins, SITES, (5, 6))
    with pytest.raises(PinsError, match="3 pins in layer 2 are 1 too many: of its 5 slots"):
        check_room(pins, SITES, (5, 5))


counts = st.lists(st.integers(0, 10), min_size=6, max_size=6)


@settings(max_examples=150, deadline=None)
@given(counts, counts, st.integers(2, 6), st.integers(0, 1000), st.booleans())
def test_what_a_message_advises_works(
    a: list[int], b: list[int], capacity: int, mille: int, fit: bool
) -> None:
    made, places, share = profile({0: a, 2: b}), [site(0, 6), site(2, 6)], mille / 1000
    slots = (capacity, capacity)
    limit = 6 if capacity == 6 else capacity - 2
    wanted = {0: {e for e in range(6) if a[e] / 10 >= share},
              2: {e for e in range(6) if b[e] / 10 >= share}}  # fmt: skip
    fits = all(len(ids) <= limit for ids in wanted.values())
    if fits or fit:
        pins = resolve_pins(Pins(made, share=share, fit=fit), places, slots, fingerprint=MODEL)
        for layer, prompts in ((0, a), (2, b)):
            assert pins[layer] <= wanted[layer]
            assert len(pins[layer]) == min(len(wanted[layer]), limit)
            left = wanted[layer] - pins[layer]
            assert all(prompts[e] <= min(prompts[p] for p in pins[layer]) for e in left if limit)
        return
    with pytest.raises(PinsError) as caught:
        resolve_pins(Pins(made, share=share), places, slots, fingerprint=MODEL)
    said = str(caught.value)
    if "No share fits" in said:
        assert any(sorted(p)[-limit - 1] == 10 for p in (a, b))
        return
    advised = float(said.split("every layer is ")[1].split(". Or")[0])
    pins = resolve_pins(Pins(made, share=advised), places, slots, fingerprint=MODEL)
    assert any(pins.values()) or limit == 0 or max(a + b) / 10 < advised
    # A smaller one, by more than the rounding, would not.
    with pytest.raises(PinsError):
        resolve_pins(Pins(made, share=advised - 0.0011), places, slots, fingerprint=MODEL)


def test_public_names() -> None:
    assert moelab.Pins is Pins and moelab.PinsError is PinsError
