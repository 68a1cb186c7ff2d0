"""Traces: whole round trips, refusals, and recordings that were cut short."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moelab
from moelab.errors import MoelabError, ReplayError, SchemaError, StudyError
from moelab.routing.curves import curves
from moelab.routing.recording import read_recording
from moelab.routing.recovery import recover
from moelab.routing.trace import Trace, export_trace, read_trace
from moelab.routing.trace_layout import KEY, TYPES
from moelab.routing.trace_writing import write_tables
from tests.support import recordings, stock, tiny

KEPT = [
    "run", "sequence", "step", "position", "phase", "layer", "rank", "expert", "weight",
]  # fmt: skip
FRAME = recordings.routing([5, 2, 3], [6, 9, 4])
REC = recordings.recording(FRAME)
NAMES = {0: ("a tale", "prose"), 1: ("a loop", "code"), 2: ("another", "prose")}


def written(folder: Path, **options: Any) -> Trace:
    options = {"provenance": "teacher-forced", "documents": NAMES, **options}
    return read_trace(export_trace(REC, folder / "here" / "one.parquet", **options))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    trace = written(tmp_path)
    got = trace.routing
    pd.testing.assert_frame_equal(got[KEPT], FRAME[KEPT])
    assert got["document"].tolist() == [NAMES[run][0] for run in FRAME["run"]]
    assert got["domain"].tolist() == [NAMES[run][1] for run in FRAME["run"]]
    assert set(got.columns) == {*KEPT, "document", "domain"}, "no texts unless asked for"
    for layer in recordings.LAYERS:
        mine = FRAME[FRAME["layer"] == layer].reset_index(drop=True)
        pd.testing.assert_frame_equal(trace.layer(layer)[KEPT], mine[KEPT])
    assert trace.about["documents"] == [[run, *told] for run, told in NAMES.items()]
    assert trace.about["tokens"] == 29 and trace.about["slots"] == len(FRAME)
    assert trace.about["domains"] == ["code", "prose"] and trace.about["template"] is None
    assert trace.experts == dict.fromkeys(recordings.LAYERS, 12)
    assert trace.documents["document"].tolist() == ["a tale", "a loop", "another"]
    for part in ("made up", "sha256:abc", "top-3 of 12", "29, teacher-forced", "code, prose"):
        assert part in repr(trace) and part in trace._repr_html_()


def test_texts_are_written_where_asked_for(tmp_path: Path) -> None:
    got = written(tmp_path, token_ids=True, text=True, provenance="generated", template="chatml")
    assert got.about["provenance"] == "generated" and got.about["template"] == "chatml"
    frame = got.routing
    assert frame["token_id"].equals(FRAME["token_id"])
    assert frame["token"].astype(str).tolist() == FRAME["token"].astype(str).tolist()


def test_the_file_is_what_the_layout_says(tmp_path: Path) -> None:
    trace = written(tmp_path, token_ids=True, text=True)
    with pq.ParquetFile(trace.path) as file:
        table = file.read()
        kinds = {f.name: f.type for f in table.schema}
        layers = [
            set(file.read_row_group(i)["layer"].to_pylist()) for i in range(file.num_row_groups)
        ]
    assert list(kinds) == list(TYPES)
    for name, wanted in TYPES.items():
        kind = kinds[name]
        if wanted == "text":
            assert pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
        else:
            assert kind == pa.type_for_alias(wanted)
    assert layers == [{layer} for layer in recordings.LAYERS]
    rows = list(zip(*(table[n].to_pylist() for n in ("layer", "token", "rank")), strict=True))
    assert rows == sorted(rows)
    assert json.loads(table.schema.metadata[KEY])["format"] == 1
    assert [p.name for p in trace.path.parent.iterdir()] == ["one.parquet"]


def test_curves_replay_and_metrics_take_it(tmp_path: Path) -> None:
    trace = written(tmp_path)
    for source in (trace, trace.path, str(trace.path), trace.routing):
        for options in ({}, {"phase": "prefill", "by": "run"}, {"reset": "run"}):
            got, want = curves(source, **options), curves(REC, **options)  # type: ignore[arg-type]
            pd.testing.assert_frame_equal(got.frame, want.frame)
    for policy in ("lru", "min"):
        one = moelab.replay(trace.routing, policy, capacity=5, experts=trace.experts)
        two = moelab.replay(FRAME, policy, capacity=5, experts=trace.experts)
        pd.testing.assert_frame_equal(one.loads, two.loads)
        assert one.misses("layer").equals(two.misses("layer"))


def test_a_live_recording_becomes_a_trace(tmp_path: Path) -> None:
    with moelab.load(stock.folder("qwen3_moe"), 0.5) as lab, lab.record() as rec:
        lab.generate(tiny.prompt(9), 5, template=False, prefill_step_size=4)
        lab.generate(tiny.prompt(5), 5, template=False)
    path = export_trace(rec, tmp_path / "live.parquet", provenance="generated")
    trace = read_trace(path, fingerprint=lab.fingerprint)
    pd.testing.assert_frame_equal(trace.routing[KEPT], rec.routing[KEPT])
    assert trace.about["recorded"] == rec.run["started"]
    pd.testing.assert_frame_equal(curves(trace).frame, curves(rec).frame)
    assert trace.routing["document"].unique().tolist() == ["run 0", "run 1"]


def test_documents_by_frame(tmp_path: Path) -> None:
    told = pd.DataFrame({"run": [2, 1, 0], "document": ["c", "b", "a"]})
    assert written(tmp_path, documents=told).about["documents"] == [
        [0, "a", ""], [1, "b", ""], [2, "c", ""],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"provenance": "recorded"}, StudyError, "got 'recorded'"),
        ({"documents": {0: "a"}}, StudyError, r"nothing of the runs \[1, 2\]"),
        ({"documents": pd.DataFrame({"run": [0]})}, SchemaError, "lacks the columns document"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        written(tmp_path, **options)
    assert not list(tmp_path.rglob("*.p*"))


def test_lossy_recordings_are_refused(tmp_path: Path) -> None:
    frame = FRAME.copy()
    frame.loc[3, "outcome"] = "drop"
    with pytest.raises(ReplayError, match="lossy"):
        export_trace(recordings.recording(frame), tmp_path / "x", provenance="generated")


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path).path
    before = path.read_bytes()

    def tables() -> Any:
        yield pa.table({"layer": pa.array([1], pa.int16())})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tables(path, {}, tables())
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(MoelabError, match="is a folder"):
        export_trace(REC, tmp_path, provenance="generated")
    (tmp_path / "file").touch()
    with pytest.raises(MoelabError, match="cannot be written"):
        export_trace(REC, tmp_path / "file" / "x", provenance="generated")


def test_a_file_that_was_cut_short_says_so(tmp_path: Path) -> None:
    path = written(tmp_path).path
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StudyError, match=r"one\.parquet cannot be read as a trace.*cut short"):
            read_trace(path)
    with pytest.raises(StudyError, match="There is no file"):
        read_trace(tmp_path / "none")


def test_a_recording_folder_that_was_cut_short_names_the_file(tmp_path: Path) -> None:
    folder = REC.save(tmp_path / "rec")
    file = folder / "routing.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MoelabError, match=r"routing\.parquet cannot be read"):
        curves(read_recording(folder))


def rewritten(path: Path, change: Any) -> Path:
    """Edits a trace by hand: its table, its metadata or both."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[KEY])
    table, about = change(table, about)
    metadata = {} if about is None else {KEY: json.dumps(about).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=87)
    return path


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, a: (t, None), StudyError, "no trace"),
        (lambda t, a: (t, {**a, "format": 2}), StudyError, "layout 2, and this moelab reads 1"),
        (lambda t, a: (t, {k: a[k] for k in a if k != "model"}), StudyError, "not say model"),
        (lambda t, a: (t.drop_columns("expert"), a), SchemaError, "lacks the column expert"),
        (lambda t, a: (t.drop_columns("layer"), a), SchemaError, "lacks the column layer"),
        (lambda t, a: (t, {**a, "layers": [1, 3, 5]}), SchemaError, r"column layer has \[4\]"),
        (lambda t, a: (t.sort_by("token"), a), StudyError, "more than one layer"),
        (
            lambda t, a: (t.set_column(10, "expert", pa.array([1.5] * len(t))), a),
            SchemaError,
            "column expert is double, and it must be int32",
        ),
    ],
)
def test_other_layouts_are_refused(
    tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    path = rewritten(written(tmp_path).path, change)
    with pytest.raises(error, match=words):
        read_trace(path)


def test_other_models_and_layers_are_refused_where_asked(tmp_path: Path) -> None:
    trace = written(tmp_path)
    with pytest.raises(StudyError, match="sha256:abc, and sha256:def was asked for"):
        read_trace(trace.path, fingerprint="sha256:def")
    with pytest.raises(StudyError, match="no layer 7"):
        trace.layer(7)
    with pytest.raises(StudyError, match="leave out experts="):
        curves(trace, experts=12)
    documents = [[0, "x", "y"]] * 3
    rewritten(trace.path, lambda t, a: (t, {**a, "documents": documents}))
    with pytest.raises(SchemaError, match="column document"):
        read_trace(trace.path).layer(1)


def test_a_recording_cut_short_goes_back_to_its_last_whole_token() -> None:
    slots = 3 * len(recordings.LAYERS)
    count = len(FRAME) // slots
    for cut in range(1, slots):
        short = FRAME.iloc[: (count - 1) * slots + cut]
        with pytest.warns(UserWarning, match=r"1 token of 29 did not reach all layers"):
            got = recover(short, recordings.LAYERS)
        pd.testing.assert_frame_equal(got, FRAME.iloc[: (count - 1) * slots])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recover(FRAME, recordings.LAYERS) is FRAME
        short = FRAME.iloc[: 7 * slots]
        assert recover(short, recordings.LAYERS, [3] * 3) is short


def test_tokens_of_an_interrupted_step_are_left_out(tmp_path: Path) -> None:
    """A prompt that was interrupted in its second layer, before another run began."""
    hurt = (FRAME["run"] == 1) & (FRAME["step"] == 0) & (FRAME["layer"] == 4)
    frame = FRAME[~hurt].reset_index(drop=True)
    with pytest.warns(UserWarning, match="2 tokens of 29"):
        path = export_trace(recordings.recording(frame), tmp_path / "x", provenance="generated")
    whole = FRAME[(FRAME["run"] != 1) | (FRAME["step"] != 0)].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_trace(path).routing[KEPT], whole[KEPT])


def test_identity_experts_are_no_cut(tmp_path: Path) -> None:
    """Slots of weight 0 have no rows: fewer ranks than top-k, also in the last token."""
    rng = np.random.default_rng(1)
    frame = FRAME[(FRAME["rank"] < 2) | (rng.random(len(FRAME)) < 0.5)].reset_index(drop=True)
    frame = frame[~((frame["position"] == 6) & (frame["run"] == 2) & (frame["rank"] == 2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_trace(recordings.recording(frame), tmp_path / "x", provenance="generated")
    assert len(read_trace(path).routing) == len(frame)


def test_what_cannot_be_recovered() -> None:
    with pytest.raises(StudyError, match="within its first token"):
        recover(FRAME.iloc[:4], recordings.LAYERS)
    with pytest.raises(StudyError, match=r"layers \[4\], and the model has \[1, 3\]"):
        recover(FRAME, [1, 3])
    with pytest.raises(StudyError, match="no rows"):
        recover(FRAME.iloc[:0], [1, 3])
    with pytest.raises(SchemaError, match="lacks the columns sequence"):
        recover(FRAME.drop(columns="sequence"), [1, 3])
