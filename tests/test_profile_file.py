"""Profile files: mlx-moe's format both ways, damage told apart, whole or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelab
from moelab.errors import ProfileError
from moelab.experts.profile import Profile, Use
from moelab.experts.tally import Tally

# As mlx-moe's generator writes them, and the least that its loader takes.
MLX_MOE: dict[str, Any] = {
    "model": "mlx-community/Qwen3-Coder-Next-4bit", "num_prompts": 22, "threshold": 0.5,
    "capacity": 208, "num_experts": 512, "moe_layers": 48, "prompt_preset": "mixed",
    "mix": {"coding_weight": 70, "toolchat_weight": 30, "num_prompts": 22, "seed": 42},
    "layers": {
        "0": {"universal": [10, 42], "activation_counts": {"10": 20, "42": 15, "100": 5},
              "total_unique": 3},
        "5": {"universal": [3], "activation_counts": {"3": 22}, "total_unique": 1},
    },
}  # fmt: skip
LEAST: dict[str, Any] = {
    "num_prompts": 22,
    "layers": {
        "0": {"activation_counts": {"10": 20, "42": 15, "100": 5}},
        "5": {"activation_counts": {"3": 22}},
    },
}


def sites(experts: dict[int, int], top_k: int = 2) -> list[Any]:
    return [SimpleNamespace(layer=i, experts=n, top_k=top_k) for i, n in experts.items()]


def made(seed: int = 0, experts: tuple[int, ...] = (5, 7), unknown_mass: bool = False) -> Profile:
    """A profile of random prompts of 3 tokens, top-2, in two domains."""
    rng = np.random.default_rng(seed)
    layers = [2 * i + 1 for i in range(len(experts))]
    tally = Tally(layers, experts)
    for prompt in range(4):
        place = np.concatenate([
            tally.place(layer, np.concatenate([rng.choice(n, 2, replace=False) for _ in range(3)]))
            for layer, n in zip(layers, experts, strict=True)
        ])  # fmt: skip
        weight = rng.random(len(place)) / 3
        if unknown_mass:
            weight[: len(place) // len(experts)] = np.nan
        tally.add_prompt("ab"[prompt % 2], 3, place, weight)
    return tally.profile(
        model="some/model", fingerprint="0123456789abcdef", top_k=[2] * len(layers),
        phase_tokens={"prefill": 3}, prompt_tokens=3,
        provenance={"made_by": "a test", "capacity": [4, 6], "prompts": "p.txt", "n": None},
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(2, 70), min_size=1, max_size=4), st.booleans())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, seed: int, experts: list[int], unknown: bool
) -> None:
    profile = made(seed, tuple(experts), unknown)
    path = profile.save(tmp_path_factory.getbasetemp() / "round" / "p.json")
    again = moelab.read_profile(path)
    assert again.usage.equals(profile.usage)
    assert repr(again) == repr(profile)
    for name in ("model", "fingerprint", "experts", "top_k", "prompt_tokens", "phase_tokens",
                 "num_prompts", "provenance", "domains", "layers"):  # fmt: skip
        assert getattr(again, name) == getattr(profile, name), name
    assert [again.order(i) for i in again.layers] == [profile.order(i) for i in profile.layers]
    assert again.universal(0.7) == profile.universal(0.7)


def test_what_is_written_is_mlx_moe_s_format(tmp_path: Path) -> None:
    profile = made()
    data = json.loads(profile.save(tmp_path / "p.json").read_text(encoding="utf-8"))
    assert list(data) == [*MLX_MOE, "moelab"]
    assert (data["num_prompts"], data["num_experts"], data["moe_layers"]) == (4, 7, 2)
    assert data["mix"] == {"a": 2, "b": 2} and data["capacity"] == 6
    for layer, entry in data["layers"].items():
        counts = {int(e): n for e, n in entry["activation_counts"].items()}
        assert counts == {e: n for e, n in enumerate(profile.activations[int(layer)].tolist()) if n}
        assert entry["total_unique"] == len(counts)
        # Its own rule, which for an even number of prompts is ours.
        assert entry["universal"] == sorted(e for e, n in counts.items() if n >= int(0.5 * 4))
    assert data["moelab"]["format"] == 1
    # And it reads as mlx-moe's own does, without what moelab adds.
    del data["moelab"]
    (tmp_path / "q.json").write_text(json.dumps(data), encoding="utf-8")
    bare = moelab.read_profile(tmp_path / "q.json")
    assert bare.fingerprint is None
    assert bare.universal() == profile.universal()


@pytest.mark.parametrize("data", [MLX_MOE, LEAST], ids=["whole", "least"])
def test_mlx_moe_s_files_are_read(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    profile = moelab.read_profile(path)
    assert profile.layers == (0, 5) and profile.num_prompts == 22
    assert profile.order(0)[:4] == [10, 42, 100, 0] and profile.order(5)[0] == 3
    assert profile.universal() == {0: (10, 42), 5: (3,)}
    assert profile.fingerprint is None and profile.counts(0) is None
    assert "fingerprint unknown" in repr(profile) and "22 of unknown tokens" in repr(profile)
    usage = profile.usage.set_index(["layer", "expert"])
    assert usage.loc[(0, 42), "prompts"] == 15
    assert usage.loc[(0, 42), "prompt_share"] == pytest.approx(15 / 22)
    assert usage[["count", "share", "mass", "uniform_prompt_share"]].isna().all().all()
    fits = sites({0: 512, 3: 512, 5: 512})
    with pytest.warns(UserWarning, match="does not say which checkpoint"):
        profile.check("any", fits)
    with pytest.raises(ProfileError, match="of layer 5, and the model's MoE layers are 0, 1"):
        profile.check("any", sites({0: 512, 1: 512}))
    with pytest.raises(ProfileError, match="experts in layer 0, and the model has 64"):
        profile.check("any", sites({0: 64, 5: 512}))
    again = moelab.read_profile(profile.save(tmp_path / "again.json"))
    assert again.usage.equals(profile.usage) and again.provenance == profile.provenance


def test_a_profile_of_another_model_is_refused() -> None:
    profile = made()
    profile.check("0123456789abcdef", sites({1: 5, 3: 7}))
    with pytest.raises(ProfileError, match=r"some/model \(fingerprint 0123456789abcdef\).*beef"):
        profile.check("beef", sites({1: 5, 3: 7}))


def edit(*path: Any, to: Any = ...) -> Callable[[Any], Any]:
    """Returns what changes one entry of a file, or takes it out."""

    def change(data: Any) -> Any:
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return data

    return change


OWN = "moelab"
ROW = (OWN, "uses", 0, "layers", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [], "the file is no JSON object"),
        (lambda _: {}, "no 'num_prompts'"),
        (edit("num_prompts"), "no 'num_prompts'"),
        (edit("num_prompts", to=0), "num_prompts is 0, which is no count from 1"),
        (edit("num_prompts", to=True), "num_prompts is True"),
        (edit("num_prompts", to=2.0), "num_prompts is 2.0"),
        (edit("num_prompts", to=1), "there can be only 1"),
        (edit("layers"), "no 'layers'"),
        (edit("layers", to={}), "it has no layers"),
        (edit("layers", "1"), "layers are not those that moelab.layers lists"),
        (edit("layers", "x", to={}), "'x' is no number"),
        (edit("layers", "-1", to={}), "'-1' is no number"),
        (edit("layers", "1", to=3), "layer 1 is no JSON object"),
        (edit("layers", "1", "activation_counts"), "layer 1 has no 'activation_counts'"),
        (edit("layers", "1", "activation_counts", "5", to=1), "expert 5 and 5 experts"),
        (edit("layers", "1", "activation_counts", "70000", to=1), "no model has so many"),
        (edit("layers", "1", "activation_counts", "1_0", to=1), "'1_0' is no number"),
        (edit("layers", "1", "activation_counts", "0", to=-1), "is -1, which is no count"),
        (edit("layers", "1", "activation_counts", "0", to=5), "is 5, and there can be only 4"),
        (edit("layers", "1", "activation_counts", "0", to="2"), "which is no count"),
        (edit(OWN, to=7), "moelab is no JSON object"),
        (edit(OWN, "format", to=2), "has format 2, and this moelab reads format 1"),
        (edit(OWN, "format"), "has format None"),
        (edit(OWN, "fingerprint"), "no 'fingerprint'"),
        (edit(OWN, "fingerprint", to=1), "fingerprint is 1"),
        (edit(OWN, "experts", to=[5]), "not lists of one length"),
        (edit(OWN, "top_k", to=[2, 0]), "top_k is 0"),
        (edit(OWN, "experts", to=[5, 10**12]), "there can be only 65536"),
        (edit(OWN, "prompt_tokens", to=None), "prompt_tokens is None"),
        (edit(OWN, "phase_tokens", to={"prefill": 0}), "phase_tokens.prefill is 0"),
        (edit(OWN, "uses", to=[]), "uses is no list, or empty"),
        (edit(OWN, "uses", 0, to=1), r"uses\[0\] is no JSON object"),
        (edit(OWN, "uses", 0, "tokens"), "no 'tokens'"),
        (edit(OWN, "uses", 0, "layers", "1"), "no '1'"),
        (edit(*ROW, "count"), "no 'count'"),
        (edit(*ROW, "count", to=[1, 2]), "is no list of 5 numbers"),
        (edit(*ROW, "count", 0, to=7), "is 7, and there can be only 6"),
        (edit(*ROW, "prompts", 0, to=3), "is 3, and there can be only 2"),
        (edit(*ROW, "mass", 0, to="1"), "which is no gate mass"),
        (edit(*ROW, "mass", 0, to=float("inf")), "which is no gate mass"),
        (edit(OWN, "provenance", to=[]), "provenance is no JSON object"),
    ],
)
def test_damage_is_told(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = made().save(tmp_path / "p.json")
    data = change(copy.deepcopy(json.loads(path.read_text(encoding="utf-8"))))
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ProfileError, match=message) as caught:
        moelab.read_profile(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_num_experts_of_mlx_moe_must_hold(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for number, message in ((100, "expert 100 and 100 experts"), ("many", "num_experts is 'many'")):
        path.write_text(json.dumps({**MLX_MOE, "num_experts": number}), encoding="utf-8")
        with pytest.raises(ProfileError, match=message):
            moelab.read_profile(path)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        moelab.read_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        moelab.read_profile(tmp_path)
    path = made().save(tmp_path / "p.json")
    whole = path.read_bytes()
    for part in (b"", whole[: len(whole) // 2], b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(part)
        with pytest.raises(ProfileError, match="is not JSON"):
            moelab.read_profile(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write_text", "replace"])
def test_written_whole_or_not_at_all(
    at: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(1).save(tmp_path / "p.json")
    before = path.read_bytes()

    def fail(self: Path, *args: Any, **_: Any) -> None:
        if at == "write_text":
            self.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, at, fail)
        expected = ProfileError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            made(2).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]
    assert made(2).save(path).read_bytes() != before


def test_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="is a folder"):
        made().save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be made"):
        made().save(tmp_path / "file" / "p.json")


def test_unknown_mass_is_null(tmp_path: Path) -> None:
    profile = made(unknown_mass=True)
    text = profile.save(tmp_path / "p.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "null" in text
    use: Use = moelab.read_profile(tmp_path / "p.json").uses[0]
    assert np.isnan(use.mass[1][use.counts[1] > 0]).all() and not np.isnan(use.mass[3]).any()
