"""The loader brings the right bytes into the right slots, however they lie on disk."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.checkpoint.headers import TensorSpan
from moelab.errors import CheckpointError
from moelab.experts import loader as loader_module
from moelab.experts.loader import ExpertLoader, TensorRows
from moelab.experts.readers import Batch, Files
from moelab.experts.residency import Load

EXPERTS = 12
SLOTS = 7


def write(
    folder: Path, layout: str, sizes: Sequence[int], seed: int
) -> tuple[dict[tuple[str, str], tuple[TensorSpan, ...]], dict[str, np.ndarray]]:
    """Random tensors on disk; where they are, and what they are, (experts, bytes) by name."""
    random = np.random.default_rng(seed)
    content = {
        f"p{n}": random.integers(0, 256, (EXPERTS, size), np.uint8) for n, size in enumerate(sizes)
    }
    spans: dict[tuple[str, str], tuple[TensorSpan, ...]] = {}
    if layout == "stacked":
        at = 5
        with (folder / "stacked").open("wb") as file:
            file.write(b"x" * 5)
            for name, rows in content.items():
                file.write(rows.tobytes())
                place = TensorSpan(folder / "stacked", "U8", rows.shape, at, rows.nbytes)
                spans[name, "weight"] = (place,)
                at += rows.nbytes
    elif layout == "packed":
        stride = sum(sizes) + 3
        whole = np.concatenate([*content.values(), np.full((EXPERTS, 3), 0xEE, np.uint8)], axis=1)
        (folder / "packed").write_bytes(b"yy" + whole.tobytes())
        at = 2
        for name, rows in content.items():
            place = TensorSpan(folder / "packed", "U8", rows.shape, at, rows.nbytes, stride)
            spans[name, "weight"] = (place,)
            at += rows.shape[1]
    else:
        # A tensor an expert, in two files, in an order of its own: some side by side, some not.
        files = [folder / "one", folder / "two"]
        data = [bytearray(), bytearray(b"zzz")]
        found: dict[tuple[str, int], TensorSpan] = {}
        order = [(name, e) for e in range(EXPERTS) for name in content]
        if seed % 2:
            order = [order[i] for i in random.permutation(len(order))]
        for name, expert in order:
            which = int(random.integers(2)) if seed % 3 else expert % 2
            row = content[name][expert]
            found[name, expert] = TensorSpan(
                files[which], "U8", row.shape, len(data[which]), row.nbytes
            )
            data[which] += row.tobytes()
        for path, text in zip(files, data, strict=True):
            path.write_bytes(text)
        for name in content:
            spans[name, "weight"] = tuple(found[name, e] for e in range(EXPERTS))
    return spans, content


def make(files: Files, spans: Any, content: dict[str, np.ndarray]) -> ExpertLoader:
    rows = {
        key: TensorRows(".".join(key), where, np.zeros((SLOTS, content[key[0]].shape[1]), np.uint8))
        for key, where in spans.items()
    }
    return ExpertLoader(files, rows)


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from(["stacked", "packed", "own"]),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    events=st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=SLOTS, unique=True),
        min_size=1,
        max_size=4,
    ),
    threads=st.integers(1, 4),
    run_bytes=st.integers(1, 400),
    together=st.booleans(),
)
def test_the_right_bytes(
    layout: str,
    sizes: list[int],
    seed: int,
    events: list[list[int]],
    threads: int,
    run_bytes: int,
    together: bool,
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "PARALLEL_BYTES", 1 if together else 1 << 40)
        patch.setattr(loader_module, "RUN_BYTES", run_bytes)
        spans, content = write(Path(name), layout, sizes, seed)
        files = Files(threads)
        loader = make(files, spans, content)
        assert loader.expert_disk_bytes == sum(sizes)
        slots = {key: np.zeros((SLOTS, rows.shape[1]), np.uint8) for key, rows in content.items()}
        for event in events:
            placed = np.random.default_rng(seed).permutation(SLOTS)
            loads = [Load(e, int(slot), None) for e, slot in zip(event, placed, strict=False)]
            seconds = loader.read(loads)
            assert len(seconds) == len(loads) and min(seconds) >= 0
            for load in loads:
                for key, rows in content.items():
                    slots[key][load.slot] = rows[load.expert]
            for tensor in loader.tensors:
                assert np.array_equal(tensor.slots, slots[tensor.name.partition(".")[0]])
        files.close()


class Calls:
    """Counts reads, and who did them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[list[int]] = []
        self.offsets: list[int] = []
        self.threads: set[str] = set()
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, buffers: Any, offset: int, *flags: int) -> int:
        self.sizes.append([memoryview(b).nbytes for b in buffers])
        self.offsets.append(offset)
        self.threads.add(threading.current_thread().name)
        return self._read(fd, buffers, offset, *flags)


def test_a_packed_expert_is_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, content = write(tmp_path, "packed", [30, 4, 4, 50], 0)
    files = Files()
    loader = make(files, spans, content)
    assert loader.pieces(5) == [(files.fd(tmp_path / "packed"), 2 + 5 * 91, 88)]
    calls = Calls(monkeypatch)
    loader.read([Load(5, 2, None), Load(1, 0, None)])
    assert calls.sizes == [[30, 4, 4, 50]] * 2
    assert calls.offsets == [2 + 5 * 91, 2 + 91]
    files.close()


def test_neighbours_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjacent rows are one read with a buffer for each, wherever their slots are."""
    spans, content = write(tmp_path, "stacked", [8, 3], 1)
    files = Files(1)
    loader = make(files, spans, content)
    monkeypatch.setattr(loader_module, "PARALLEL_BYTES", 1)
    calls = Calls(monkeypatch)
    loads = [Load(e, slot, None) for e, slot in ((4, 0), (9, 6), (3, 2), (5, 1))]
    loader.read(loads)
    assert sorted(zip(calls.offsets, calls.sizes, strict=True)) == [
        (5 + 3 * 8, [8, 8, 8]), (5 + 9 * 8, [8]),
        (5 + 12 * 8 + 3 * 3, [3, 3, 3]), (5 + 12 * 8 + 9 * 3, [3]),
    ]  # fmt: skip
    for load in loads:
        assert np.array_equal(loader.tensors[0].slots[load.slot], content["p0"][load.expert])
    files.close()


def test_threads_share_one_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, content = write(tmp_path, "stacked", [5000] * 4, 2)
    files = Files(3)
    loader = make(files, spans, content)
    monkeypatch.setattr(loader_module, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(loader_module, "RUN_BYTES", 1)
    calls = Calls(monkeypatch)
    for _ in range(50):
        loader.read([Load(e, e, None) for e in range(SLOTS)])
    assert 2 <= len(calls.threads) <= 3 and "MainThread" in calls.threads
    assert len(calls.sizes) == 50 * SLOTS * 4
    files.close()


@pytest.mark.parametrize("layout", ["stacked", "packed", "own"])
@pytest.mark.parametrize("together", [False, True])
def test_errors_name_the_place(
    layout: str, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, tensor and expert, whether an expert is read alone or with others."""
    spans, content = write(tmp_path, layout, [40, 7], 3)
    files = Files()
    loader = make(files, spans, content)
    monkeypatch.setattr(loader_module, "PARALLEL_BYTES", 1 if together else 1 << 40)
    path, offset = loader.tensors[1].place(8)
    os.truncate(path, offset + 2)
    loads = [Load(8, 3, None), Load(0, 1, None)]
    with pytest.raises(CheckpointError, match="ended at byte") as error:
        loader.read(loads)
    assert str(path) in str(error.value)
    if layout == "packed":
        assert f"at byte {offset + 2} while p1.weight of expert 8" in str(error.value)
    loader.settle()

    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"Reading p\d.weight of expert \d from .*Input/out"):
        loader.read(loads)
    loader.settle()
    files.close()


def test_a_file_written_to(tmp_path: Path) -> None:
    """By size or by time; the other files of the layer are looked at too."""
    spans, content = write(tmp_path, "own", [9, 9], 4)
    files = Files()
    loader = make(files, spans, content)
    loads = [Load(0, 0, None)]
    loader.read(loads)
    for change in ("time", "size", "removed"):
        file = tmp_path / "two"
        state = file.stat()
        if change == "time":
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        elif change == "size":
            os.truncate(file, state.st_size + 1)
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        else:
            file.unlink()  # its bytes stay readable as long as it is open
            loader.read(loads)
            continue
        with pytest.raises(CheckpointError, match=r"two was written to since .*Load the model"):
            loader.read(loads)
        os.truncate(file, state.st_size)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        loader.read(loads)
    files.close()


# The queue that threads share.


def test_a_batch_does_every_job_once() -> None:
    files = Files(4)
    done: list[int] = []
    for count in (0, 1, 2, 50):
        done.clear()
        Batch().work(files, list(range(count)), done.append)
        assert sorted(done) == list(range(count))
    files.close()


def test_an_abandoned_batch_is_over() -> None:
    """Interrupted, it has helpers at work; once abandoned nothing more is done, ever."""
    files = Files(3)
    batch = Batch()
    done: list[int] = []
    begun = threading.Barrier(3)

    def job(number: int) -> None:
        if number < 3:
            begun.wait(5)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            threading.Event().wait(0.05)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        batch.work(files, list(range(100)), job)
    batch.abandon()
    so_far = list(done)
    assert len(so_far) >= 2
    threading.Event().wait(0.1)
    assert done == so_far
    files.close()


def test_a_helper_that_fails_ends_the_batch() -> None:
    files = Files(2)
    both = threading.Barrier(2)
    done: list[int] = []

    def job(number: int) -> None:
        if number < 2:
            both.wait(5)
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("in the helper")
            threading.Event().wait(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="in the helper"):
        Batch().work(files, list(range(50)), job)
    assert len(done) < 50
    files.close()
