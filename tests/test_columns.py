"""The schema, parquet out and in, and folders that are whole or absent."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from mlx_lm.generate import batch_generate

import moelab
from moelab.errors import MoelabError
from moelab.routing.columns import SCHEMA
from moelab.routing.recording import TABLES, Recording, frame_builder
from moelab.routing.store import TOKEN, Rows, Store
from tests.support import stock, tiny

ODD = [
    "",
    " ",
    "\n",
    "NaN",
    "None",
    "nan",
    "\x00",
    "\ufffd",
    "e\u0301",
    "\U0001f980",
    "a,b",
    "'\"\\",
]
"""Texts that a file format may change."""


@pytest.fixture(scope="module")
def recording() -> Recording:
    """With padding, several runs, NaN and real surprise, hits, misses and loads."""
    with moelab.load(stock.folder("qwen3_next"), 8) as lab, lab.record() as rec:
        lab.generate(tiny.prompt(30), 5, template=False, seed=3)
        prompts = [tiny.prompt(9, seed=1), tiny.prompt(4, seed=2)]
        batch_generate(lab.model, lab.tokenizer, prompts, max_tokens=3)
    return rec


def synthetic(texts: list[str], experts: int = 70_000) -> Recording:
    """A recording of one token for each of some texts, with large ids and extreme values."""
    store = Store([(3, 2), (900, 1)], experts)
    count = len(texts)
    tokens = np.zeros(count, TOKEN)
    tokens["token_id"], tokens["layers"], tokens["phase"] = np.arange(count), 2, 2
    tokens["position"] = np.arange(count) + 2**31 - 1 - count
    tokens["logprob"], tokens["entropy"], tokens["seconds"] = -np.inf, np.nan, 1e-30
    slots = np.zeros(3 * count, store.slot)
    slots["expert"] = np.arange(3 * count) + experts - 3 * count
    slots["weight"], slots["miss"] = np.tile([0.25, 0.75, np.nan], count), 1
    loads = np.zeros(1, store.load)
    loads["layer"], loads["expert"] = 900, experts - 1
    store.add(0, Rows(tokens, slots, loads))
    build = frame_builder(store, lambda ids: texts[ids[0]], {3: 2**40, 900: 2**41})
    recording = Recording({"model": "synthetic"}, build)
    recording.complete()
    return recording


def conforms(recording: Recording) -> None:
    for table, columns in SCHEMA.items():
        frame = getattr(recording, table)
        assert list(frame.columns) == list(columns)
        assert {n: str(t) for n, t in frame.dtypes.items()} == {
            n: column.dtype for n, column in columns.items()
        }
        assert isinstance(frame.index, pd.RangeIndex)
        if "phase" in frame:
            assert list(frame["phase"].cat.categories) == ["padding", "prefill", "decode"]


def same(a: Recording, b: Recording) -> None:
    for table in TABLES:
        pd.testing.assert_frame_equal(getattr(a, table), getattr(b, table), check_exact=True)
    assert a.run == b.run


def test_schema() -> None:
    assert TABLES == ("routing", "tokens", "loads")
    keys = ["run", "sequence", "step", "position"]
    for columns in SCHEMA.values():
        assert list(columns)[:4] == keys
        for column in columns.values():
            assert column.meaning.endswith(".") and np.dtype(column.dtype.replace("category", "O"))


def test_frames_have_the_schema(recording: Recording) -> None:
    conforms(recording)
    tokens = recording.tokens
    assert set(tokens["phase"]) == {"padding", "prefill", "decode"}
    assert tokens["logprob"].isna().any() and tokens["logprob"].notna().any()
    assert not recording.routing["hit"].all() and recording.routing["hit"].any()


def test_parquet_has_the_schema(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "rec")
    arrow = {
        "float32": "float",
        "int64": "int64",
        "int32": "int32",
        "int16": "int16",
        "bool": "bool",
    }
    for table, columns in SCHEMA.items():
        schema = pq.read_schema(tmp_path / "rec" / f"{table}.parquet")
        assert schema.names == list(columns)
        for field, column in zip(schema, columns.values(), strict=True):
            if column.dtype == "category":
                assert str(field.type).startswith("dictionary<values=")
                assert "string" in str(field.type)
            else:
                assert str(field.type) == arrow[column.dtype]


def test_out_and_in(recording: Recording, tmp_path: Path) -> None:
    folder = recording.save(tmp_path / "a" / "rec")
    again = moelab.read_recording(folder)
    same(again, recording)
    conforms(again)
    assert repr(again) == repr(recording) and "Recording" in again._repr_html_()
    pd.testing.assert_frame_equal(again.misses("phase"), recording.misses("phase"))
    # And what was read can be saved and read in turn, also over itself.
    same(moelab.read_recording(again.save(tmp_path / "b")), recording)
    same(moelab.read_recording(again.save(folder)), recording)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert stat.S_IMODE(folder.stat().st_mode) & 0o555 == 0o555 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_out_and_in_of_odd_texts_and_numbers(tmp_path: Path) -> None:
    texts = [*ODD, *ODD]  # several ids with one text
    made = synthetic(texts)
    conforms(made)
    assert made.tokens["token"].tolist() == texts
    assert made.routing["expert"].max() == 69_999, "ids beyond 16 bits"
    assert made.routing["layer"].max() == 900 and made.loads["bytes"].tolist() == [2**41]
    assert made.tokens["position"].max() == 2**31 - 2
    # The order of weights, NaN where it is not known.
    assert made.routing["weight"].tolist()[:2] == [0.75, 0.25]
    assert made.routing["weight"].isna().tolist()[:3] == [False, False, True]
    again = moelab.read_recording(made.save(tmp_path / "rec"))
    same(again, made)
    conforms(again)


def test_out_and_in_of_nothing(tmp_path: Path) -> None:
    with moelab.load(stock.folder("mixtral"), 2) as lab, lab.record() as rec:
        conforms(rec)
    conforms(rec)
    again = moelab.read_recording(rec.save(tmp_path / "rec"))
    conforms(again)
    same(again, rec)
    assert "none yet" in repr(again)


def test_embeddings_instead_of_tokens() -> None:
    """Where an embedding stands for a token it has no id, text or log-probability."""
    with moelab.load(stock.folder("mixtral"), 2) as lab:
        own = type(lab.model)

        def embedded(
            self: Any, inputs: Any, cache: Any = None, input_embeddings: Any = None
        ) -> Any:
            shape = inputs.shape if input_embeddings is None else input_embeddings.shape[:-1]
            return own.__call__(self, mx.full(shape, 5), cache)

        lab.model.__class__ = type("Model", (own,), {"__call__": embedded})
        with lab.record(prompt_logprobs=True) as rec:
            lab.model(mx.zeros((1, 0), mx.int32), input_embeddings=mx.zeros((1, 7, 64)))
    assert rec.tokens["token_id"].eq(-1).all() and len(rec.tokens) == 7
    assert rec.tokens["token"].eq("").all() and rec.tokens["logprob"].isna().all()


def test_a_slow_tokenizer_is_asked_once_for_a_token() -> None:
    asked: list[int] = []

    def slow(ids: list[int]) -> str:
        asked.extend(ids)
        return "x"

    with moelab.load(stock.folder("mixtral"), 2) as lab:
        decode = lab.tokenizer.decode
        lab.tokenizer._tokenizer.decode = lambda ids, *a, **k: slow(ids)
        try:
            with lab.record() as rec:
                lab.model(mx.array([tiny.prompt(20) * 3]))
        finally:
            del lab.tokenizer._tokenizer.decode
        assert lab.tokenizer.decode([5]) == decode([5])
    for _ in range(2):
        assert len(rec.tokens) == 60 and len(rec.routing) == 240
    assert sorted(asked) == sorted(set(tiny.prompt(20)))


def disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "disk full": (pd.DataFrame, "to_parquet", disk_full),
    "interrupt while writing": (pd.DataFrame, "to_parquet", interrupt),
    "disk full at the manifest": (Path, "write_text", disk_full),
    "no folder": (Path, "mkdir", disk_full),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("before", ["absent", "a recording"])
@pytest.mark.parametrize("failure", [*FAILURES, "rename 1", "rename 2"])
def test_whole_or_as_it_was(
    recording: Recording, tmp_path: Path, monkeypatch: Any, failure: str, before: str
) -> None:
    if before == "a recording":
        synthetic(["x"]).save(tmp_path / "rec")
    found = tree(tmp_path)
    with monkeypatch.context() as patch:
        if failure in FAILURES:
            patch.setattr(*FAILURES[failure])
        else:
            calls, rename = [0], Path.rename

            def failing(self: Path, target: Path) -> Path:
                calls[0] += 1
                if calls[0] == int(failure[-1]):
                    raise OSError(5, "Input/output error")
                return rename(self, target)

            patch.setattr(Path, "rename", failing)
        if (failure, before) == ("rename 2", "absent"):
            recording.save(tmp_path / "rec")  # one rename is enough
            found = tree(tmp_path)
        else:
            with pytest.raises((OSError, KeyboardInterrupt)):
                recording.save(tmp_path / "rec")
    assert tree(tmp_path) == found
    assert not list(tmp_path.glob(".rec*")), "something was left behind"
    same(moelab.read_recording(recording.save(tmp_path / "rec")), recording)


@pytest.mark.parametrize("kind", ["file", "other", "more", "subfolder", "link", "dangling"])
def test_leaves_other_things_alone(recording: Recording, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "rec"
    if kind == "file":
        target.write_text("mine")
    elif kind == "other":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    elif kind in ("more", "subfolder"):
        recording.save(target)
        (target / "mine").mkdir() if kind == "subfolder" else (target / "x.txt").write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    found = tree(tmp_path)
    with pytest.raises(MoelabError, match="left alone"):
        recording.save(target)
    assert tree(tmp_path) == found
    (tmp_path / "empty").mkdir()
    same(moelab.read_recording(recording.save(tmp_path / "empty")), recording)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "run.json").unlink(), "holds no recording"),
        (lambda p: (p / "run.json").write_text("{"), "holds no recording"),
        (lambda p: (p / "run.json").write_text("[1]"), "holds no recording"),
        (lambda p: (p / "run.json").write_text('{"model": "x"}'), "holds no recording"),
        (lambda p: (p / "run.json").write_text('{"format": 99}'), "has format 99"),
        (lambda p: (p / "loads.parquet").unlink(), "lacks loads.parquet"),
        (lambda p: (p / "tokens.parquet").write_bytes(b"PAR1 not"), "cannot be read"),
        (
            lambda p: pd.DataFrame({"run": [0]}).to_parquet(p / "tokens.parquet"),
            "cannot be read",
        ),
    ],
)
def test_reading_what_is_no_recording(
    recording: Recording, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = recording.save(tmp_path / "rec")
    damage(folder)
    with pytest.raises(MoelabError, match=message):
        _ = moelab.read_recording(folder).tokens


def test_reading_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MoelabError, match="holds no recording"):
        moelab.read_recording(tmp_path / "nowhere")


def test_the_manifest_is_json(recording: Recording, tmp_path: Path) -> None:
    recording.run["odd"] = {"number": np.float32(0.5), "count": np.int64(3), "place": tmp_path}
    try:
        text = (recording.save(tmp_path / "rec") / "run.json").read_text(encoding="utf-8")
    finally:
        odd = recording.run.pop("odd")
    assert json.loads(text)["odd"] == {"number": 0.5, "count": 3, "place": str(odd["place"])}
    assert json.loads(text)["format"] == 2
