"""A sweep that is spread over processes has the rows of one in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pandas as pd
import pytest

from moelab.errors import StudyError
from moelab.study.sweep import Sweep, sweep
from tests.support import stock
from tests.support.sweeps import PROMPTS


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    )
    with cluster, distributed.Client(cluster) as made:
        yield made


SETTINGS: dict[str, Any] = {
    "capacity": 6,
    "policy": "lfru",
    "on_miss": ["load", "drop"],
    "pins": [None, "random:1"],
    "seeds": [0, 1],
    "prompts": PROMPTS,
    "prefix": 9,
    "tokens": 3,
    "progress": False,
}


def test_the_same_rows(client: Any, tmp_path: Path) -> None:
    path = stock.folder("olmoe")
    here = sweep(path, **SETTINGS)
    there = sweep(path, **SETTINGS, client=client, out=tmp_path / "out")
    pd.testing.assert_frame_equal(here.frame, there.frame)
    assert len(here.frame) == 2 * 3 * len(PROMPTS)
    # The folder can be gone on with in one process, and nothing of it is made again.
    (gone,) = sorted((tmp_path / "out").glob("part-*"))[3:4]
    gone.unlink()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("part-*")}
    again = sweep(path, **SETTINGS, out=tmp_path / "out")
    pd.testing.assert_frame_equal(here.frame, again.frame)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert len(Sweep.read(tmp_path / "out").frame) == len(here.frame)


def test_workers_let_their_models_go(client: Any) -> None:
    sweep(stock.folder("olmoe"), 6, prompts=PROMPTS[:2], prefix=9, tokens=2, client=client,
          progress=False)  # fmt: skip

    def held() -> list[str]:
        from moelab.study.distributed import _HELD

        return sorted(_HELD)

    assert list(client.run(held).values()) == [[], []]


def test_errors_come_back(client: Any) -> None:
    path = stock.folder("olmoe")
    with pytest.raises(StudyError, match="2 of 2 prompts are too short"):
        sweep(path, 6, prompts=["a", "b"], client=client, progress=False)
    with pytest.raises(StudyError, match="cannot be sent to other processes"):
        sweep(object(), 6, prompts=PROMPTS, client=client)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=r"dask\.distributed\.Client, got str"):
        sweep(path, 6, prompts=PROMPTS, client="tcp://localhost")


def test_workers_must_be_processes_of_one_thread() -> None:
    path = stock.folder("olmoe")
    for options in ({"threads_per_worker": 2}, {"threads_per_worker": 1}):
        cluster = distributed.LocalCluster(
            n_workers=1, processes=False, dashboard_address=":0", **options
        )
        with (
            cluster,
            distributed.Client(cluster) as made,
            pytest.raises(StudyError, match="threads_per_worker=1, processes=True"),
        ):
            sweep(path, 6, prompts=PROMPTS, client=made, progress=False)


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not there
    with pytest.raises(StudyError, match=r"pip install 'moelab\[distributed\]'"):
        sweep(stock.folder("olmoe"), 6, prompts=PROMPTS, client=object())
