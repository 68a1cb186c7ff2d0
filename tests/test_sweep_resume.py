"""A sweep's folder: nothing that was finished is lost or made again, and nothing else gets in."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import moelab
from moelab.errors import SchemaError, StudyError
from moelab.study import runner as running
from moelab.study.price_policy import PricePolicy
from moelab.study.rows import COLUMNS, checked_rows, read_part
from moelab.study.sweep import Sweep, sweep
from tests.support import stock
from tests.support.sweeps import PROMPTS
from tests.support.tiny import experts, moe_layers

SETTINGS: dict[str, Any] = {
    "capacity": [9, 6], "on_miss": ["load", "drop", "substitute"], "prompts": PROMPTS[:3],
    "prefix": 10, "tokens": 3, "progress": False,
}  # fmt: skip
POINTS, LOSSY = 6, 4


@pytest.fixture(scope="module")
def path() -> Path:
    return stock.folder("olmoe")


@pytest.fixture(scope="module")
def whole(path: Path) -> pd.DataFrame:
    """The frame of a sweep that nothing interrupted."""
    return sweep(path, **SETTINGS).frame


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which rows were made, by point, as they are made."""
    found: list[str] = []
    row = running.Runner._row

    def noted(self: Any, point: Any, window: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(f"{point.on_miss} {point.capacity} {window.document}")
        return row(self, point, window, *args, **kwargs)

    monkeypatch.setattr(running.Runner, "_row", noted)
    return found


def parts(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("part-*"))}


def read(folder: Path, whole: pd.DataFrame) -> pd.DataFrame:
    """What the folder has of the whole sweep, in its order."""
    found = Sweep.read(folder).frame
    return whole[["point", "window"]].merge(found, on=["point", "window"])[list(COLUMNS)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_interrupt_in_the_middle(
    path: Path, whole: pd.DataFrame, made: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException],
) -> None:  # fmt: skip
    lossy = running.Runner._lossy
    calls = 0

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second prompt of the second lossy point
            raise error("in the middle")
        return lossy(self, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(running.Runner, "_lossy", failing)
        with pytest.raises(error, match="in the middle"):
            sweep(path, **SETTINGS, out=out)
    before = parts(out)
    assert len(before) == 3, "two exact points and a lossy one"
    assert len(Sweep.read(out).frame) == 9
    made.clear()
    again = sweep(path, **SETTINGS, out=out)
    assert len(made) == len(whole) - 9, "no finished point is made again"
    pd.testing.assert_frame_equal(again.frame, whole)
    assert before.items() <= parts(out).items()
    made.clear()
    pd.testing.assert_frame_equal(sweep(path, **SETTINGS, out=out).frame, whole)
    assert made == []
    pd.testing.assert_frame_equal(read(out, whole), whole)


def test_a_finished_sweep_runs_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(path, **SETTINGS, out=tmp_path / "out")
    monkeypatch.setattr(running.Runner, "_run_exactly", None)
    sweep(path, **SETTINGS, out=tmp_path / "out")


def test_killed(path: Path, whole: pd.DataFrame, tmp_path: Path, made: list[str]) -> None:
    """SIGKILL, which nothing can catch, while rows are being made."""
    out = tmp_path / "out"
    code = textwrap.dedent(f"""
        import time
        from moelab.study import runner
        from moelab.study.sweep import sweep
        from tests.test_sweep_resume import SETTINGS
        lossy = runner.Runner._lossy
        def slow(*args):
            time.sleep(0.3)  # so that the kill comes in the middle
            return lossy(*args)
        runner.Runner._lossy = slow
        sweep({str(path)!r}, **SETTINGS, out={str(out)!r})
    """)
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as process:
        for _ in range(600):
            if len(parts(out)) >= 3 or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, "it must not have ended by itself"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = parts(out)
    assert 3 <= len(before) < POINTS
    again = sweep(path, **SETTINGS, out=out)
    pd.testing.assert_frame_equal(again.frame, whole)
    assert len(made) == len(whole) - 3 * len(before)
    assert before.items() <= parts(out).items()


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_part_is_found_and_made_again(
    path: Path, whole: pd.DataFrame, tmp_path: Path, made: list[str], damage: str
) -> None:
    out = tmp_path / "out"
    sweep(path, **SETTINGS, out=out)
    part = sorted(out.glob("part-*"))[1]
    data = bytearray(part.read_bytes())
    if damage == "flipped":  # a bit of the values; the footer, which says what is where, is whole
        at = pq.ParquetFile(part).metadata.row_group(0).column(list(COLUMNS).index("nll"))
        data[at.data_page_offset + at.total_compressed_size - 9] ^= 1
    lengths = {"cut": len(data) // 2, "empty": 0, "flipped": len(data)}
    part.write_bytes(bytes(data[: lengths[damage]]))
    with pytest.raises(StudyError, match="cut short or damaged"):
        Sweep.read(out)
    made.clear()
    with pytest.warns(UserWarning, match="Its rows are made again"):
        again = sweep(path, **SETTINGS, out=out)
    assert len(made) == 3
    pd.testing.assert_frame_equal(again.frame, whole)
    assert len(parts(out)) == POINTS


def test_more_may_be_asked_of_the_same_folder(
    path: Path, whole: pd.DataFrame, tmp_path: Path, made: list[str]
) -> None:
    out = tmp_path / "out"
    sweep(path, **{**SETTINGS, "capacity": 9, "on_miss": ["load", "drop"]}, out=out)
    made.clear()
    found = sweep(path, **SETTINGS, out=out)
    assert len(made) == 4 * 3
    pd.testing.assert_frame_equal(found.frame, whole)
    few = sweep(path, **{**SETTINGS, "capacity": 6, "on_miss": "drop"}, out=out)
    assert len(few.frame) == 3, "only what was asked for"
    assert len(made) == 4 * 3
    assert len(Sweep.read(out).frame) == len(whole)


def test_settings_of_one_name_are_not_mixed(path: Path, tmp_path: Path) -> None:
    """Pins under one label, and policies under one name, may differ between two calls."""
    out = tmp_path / "out"
    settings = {**SETTINGS, "capacity": 8, "on_miss": "drop", "out": out}
    first = sweep(path, pins=("mine", [0, 1]), **settings).frame
    second = sweep(path, pins=("mine", [2, 3]), **settings).frame
    assert not set(first["point"]) & set(second["point"])
    assert second["pins"].unique().tolist() == ["mine"]
    with pytest.raises(StudyError, match=r"two settings.*pins='mine'.*capacity=8"):
        Sweep.read(out)  # every figure of "mine" would be a mean over both


def test_another_table_of_prices_is_another_policy(
    path: Path, made: list[str], tmp_path: Path
) -> None:
    layers, count = moe_layers("olmoe"), experts("olmoe")[0]
    low = {layer: np.arange(1.0, count + 1) for layer in layers}
    high = {layer: values[::-1] for layer, values in low.items()}
    settings = {**SETTINGS, "capacity": 6, "on_miss": "drop"}
    out = tmp_path / "out"
    sweep(path, policy=PricePolicy(low), out=out, **settings)
    made.clear()
    sweep(path, policy=PricePolicy(low), out=out, **settings)
    assert made == []
    there = sweep(path, policy=PricePolicy(high), out=out, **settings).frame
    assert len(made) == len(there) == 3, "rows of the other table are not taken for its own"
    pd.testing.assert_frame_equal(there, sweep(path, policy=PricePolicy(high), **settings).frame)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompts": PROMPTS[1:]}, "prompts is"),
        ({"prompts": PROMPTS[2::-1]}, "prompts is"),
        ({"prefix": 11}, "prefix is 10 there and 11 here"),
        ({"tokens": 4}, "tokens is 3 there and 4 here"),
        ({"swap_budget": 1}, "swap_budget is None there and 1 here"),
        ({"split": "test"}, "split is 'given' there and 'test' here"),
    ],
)
def test_other_settings_are_refused(
    path: Path, tmp_path: Path, changed: dict[str, Any], words: str, made: list[str]
) -> None:
    out = tmp_path / "out"
    one = {**SETTINGS, "capacity": 9, "on_miss": "load"}
    sweep(path, **one, out=out)
    before = parts(out)
    made.clear()
    with pytest.raises(StudyError, match=words):
        sweep(path, **{**one, **changed}, out=out)
    assert (parts(out), made) == (before, [])


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    """Of the same checkpoint, so that the fingerprint does not tell."""
    path = stock.folder("olmoe", dtype="bfloat16")
    one = {**SETTINGS, "capacity": 9, "on_miss": "load"}
    sweep(path, **one, out=tmp_path / "out")
    with pytest.raises(StudyError, match="weights is"):
        sweep(path, **one, dtype="float32", out=tmp_path / "out")
    with moelab.load(path, 9, dtype="float32") as lab, pytest.raises(StudyError, match="weights"):
        sweep(lab, **one, out=tmp_path / "out")
    with moelab.load(path, 16, pack=False) as lab:  # the same weights, read in another way
        assert len(sweep(lab, **one, out=tmp_path / "out").frame) == 3


def test_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = {**SETTINGS, "capacity": 9, "on_miss": "load"}
    sweep(path, **one, out=out)
    with pytest.raises(StudyError, match="fingerprint is"):
        sweep(stock.folder("olmoe", seed=9), **one, out=out)
    other = tmp_path / "other"
    sweep(stock.folder("olmoe", seed=9), **one, out=other)
    stranger = next(other.glob("part-*"))
    (out / stranger.name.replace(".parquet", "0.parquet")).write_bytes(stranger.read_bytes())
    for call in (lambda: Sweep.read(out), lambda: sweep(path, **one, out=out)):
        with pytest.raises(SchemaError, match="rows of another model"):
            call()


def test_what_is_no_sweep_is_left_alone(path: Path, tmp_path: Path) -> None:
    one = {**SETTINGS, "capacity": 9, "on_miss": "load"}
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("x")
    with pytest.raises(StudyError, match="holds no sweep"):
        sweep(path, **one, out=tmp_path / "letters")
    with pytest.raises(StudyError, match="is a file"):
        sweep(path, **one, out=tmp_path / "letters/dear.txt")
    with pytest.raises(StudyError, match="Give a folder"):
        sweep(path, **one, out=tmp_path / "rows.parquet")
    for folder in ("letters", "nowhere"):
        with pytest.raises(StudyError, match="holds no sweep"):
            Sweep.read(tmp_path / folder)
    (tmp_path / "empty").mkdir()
    assert len(sweep(path, **one, out=tmp_path / "empty").frame) == 3
    manifest = tmp_path / "empty/sweep.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(StudyError, match="format 99"):
        Sweep.read(tmp_path / "empty")
    for part in (tmp_path / "empty").glob("part-*"):
        part.unlink()
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    with pytest.raises(StudyError, match="without any row"):
        Sweep.read(tmp_path / "empty")


def test_a_full_disk(
    path: Path, whole: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write, calls = pq.write_table, 0

    def filling(table: Any, place: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            Path(place).write_bytes(b"PAR1")  # a part of it got there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(table, place, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", filling)
        with pytest.raises(StudyError, match=r"disk is full.*Free some space"):
            sweep(path, **SETTINGS, out=out)
    assert len(parts(out)) == 3
    assert not list(out.glob(".*"))
    pd.testing.assert_frame_equal(sweep(path, **SETTINGS, out=out).frame, whole)


def test_a_full_disk_for_real(path: Path, tmp_path: Path) -> None:
    """The same from the system itself: no file may grow beyond 15,000 bytes."""
    code = textwrap.dedent(f"""
        import resource, signal
        from moelab.errors import StudyError
        from moelab.study.rows import Folder
        folder = Folder({str(tmp_path / "out")!r}, {{}}, {{}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
        from moelab.study.rows import read_part
        from pathlib import Path
        rows = read_part(next(Path({str(tmp_path / "whole")!r}).glob("part-*")))
        try:
            folder.write(rows)
        except StudyError as error:
            print("refused:", error)
    """)
    sweep(path, **{**SETTINGS, "capacity": 9, "on_miss": "load"}, out=tmp_path / "whole")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "refused:" in done.stdout and "Nothing that was finished is lost" in done.stdout, done
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sweep.json"]


def test_what_a_dead_process_left_is_removed(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = {**SETTINGS, "capacity": 9, "on_miss": "load"}
    sweep(path, **one, out=out)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    dead, alive = out / f".part-a-{gone.pid}.tmp", out / f".part-a-{os.getpid()}.tmp"
    dead.touch()
    alive.touch()
    sweep(path, **one, out=out)
    assert (dead.exists(), alive.exists()) == (False, True)


# -- frames edited by hand -------------------------------------------------------------------


def _set(name: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def edit(frame: pd.DataFrame) -> pd.DataFrame:
        frame[name] = frame[name].astype(object)
        frame.loc[1, name] = value
        frame[name] = frame[name].infer_objects()
        return frame

    return edit


EDITS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "kl_mean": _set("kl_mean", -0.5),
    "hit_rate": _set("hit_rate", 0.123),
    "ppl": _set("ppl", 1.0),
    "nll": _set("nll", float("nan")),
    "tokens": _set("tokens", 0),
    "bytes": _set("bytes", 1),
    "same_top1": _set("same_top1", 1.5),
    "hits": _set("hits", 10**6),
    "source": _set("source", "guess"),
    "ln_ppl_ratio": _set("ln_ppl_ratio", 3.0),
    "capacity": lambda frame: frame.assign(capacity=frame["capacity"] + 0.5),
    "prompt": lambda frame: frame.drop(columns="prompt"),
    "on_miss": lambda frame: frame.assign(on_miss=3),
    "window": lambda frame: pd.concat([frame, frame.iloc[:1]], ignore_index=True),
}


@pytest.mark.parametrize("column", EDITS)
def test_a_part_that_was_edited_by_hand(
    path: Path, whole: pd.DataFrame, tmp_path: Path, column: str
) -> None:
    edited = EDITS[column](whole.copy())
    with pytest.raises(SchemaError, match=column):
        checked_rows(edited)
    if column not in ("kl_mean", "prompt"):
        return
    # The same from the folder, whether it is read or gone on with: an edit is not thrown away.
    out = tmp_path / "out"
    sweep(path, **SETTINGS, out=out)
    part = sorted(out.glob("part-*"))[0]
    EDITS[column](read_part(part)).to_parquet(part, index=False)
    before = parts(out)
    for call in (lambda: Sweep.read(out), lambda: sweep(path, **SETTINGS, out=out)):
        with pytest.raises(SchemaError, match=column):
            call()
    assert parts(out) == before


def test_a_frame_comes_back_as_it_was(whole: pd.DataFrame, tmp_path: Path) -> None:
    whole.to_parquet(tmp_path / "one.parquet", index=False)
    pd.testing.assert_frame_equal(checked_rows(pd.read_parquet(tmp_path / "one.parquet")), whole)
    whole.to_csv(tmp_path / "one.csv", index=False)
    back = pd.read_csv(tmp_path / "one.csv", keep_default_na=False, na_values={"kv_bits": [""]})
    pd.testing.assert_frame_equal(checked_rows(back), whole)
