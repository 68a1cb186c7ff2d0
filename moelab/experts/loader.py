"""From disk into slots: reads one expert's tensors by byte range, in place.

An expert's tensors are contiguous pieces of the checkpoint: row e of a stacked tensor, or a
tensor of its own. `os.preadv` reads such a piece straight into the slot's memory: no copy through
MLX, no graph, and the cost does not depend on the number of slots.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.headers import TensorSpan
from ..errors import CheckpointError
from .residency import Load

THREADS = 4
"""Readers at once. More than two gain little when the page cache is warm, eight when it is not."""

PARALLEL_BYTES = 1 << 20
"""Under this many bytes an event is read by the calling thread: handing over costs more."""


@dataclass(frozen=True, slots=True)
class TensorRows:
    """One of the tensors that each expert of a layer has: where its rows are, and its slots."""

    name: str
    """`projection.tensor`, for messages."""
    spans: tuple[TensorSpan, ...]
    """One span that stacks all experts, or one for each expert."""
    slots: np.ndarray
    """uint8 (slots, bytes), a writable view of the MLX array that the model computes with."""
    widen: bool = False
    """The disk has 16-bit floats and the slots float32."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of one expert's row on disk."""
        return self.slots.shape[1] // (2 if self.widen else 1)

    def place(self, expert: int) -> tuple[Path, int]:
        """Returns the file and offset of an expert's row."""
        span = self.spans[0]
        if len(self.spans) == 1:
            return span.path, span.offset + expert * (span.stride or self.disk_bytes)
        return self.spans[expert].path, self.spans[expert].offset


class Files:
    """The open shards of one checkpoint, shared by the layers that read from it."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def fd(self, path: Path) -> int:
        """Returns a file descriptor of `path`, open for reading."""
        fd = self._fds.get(path)
        if fd is None:
            with self._lock:
                if path not in self._fds:
                    self._fds[path] = os.open(path, os.O_RDONLY)
                fd = self._fds[path]
        return fd

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The reading threads, started when first needed."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="moelab-read")
        return self._pool

    def close(self) -> None:
        """Stops the readers and closes the files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        while self._fds:
            os.close(self._fds.popitem()[1])


class ExpertLoader:
    """Reads experts of one layer into its slots.

    Args:
        files: Open files, shared between layers.
        tensors: The layer's tensors by projection and name.
    """

    def __init__(self, files: Files, tensors: Mapping[tuple[str, str], TensorRows]) -> None:
        self._files = files
        self._tensors = tuple(tensors.values())
        self._stacked = [
            (files.fd(t.spans[0].path), t.spans[0].offset, t.disk_bytes, t.slots)
            for t in self._tensors
            if len(t.spans) == 1 and not t.widen and t.spans[0].stride is None
        ]
        # Decoding spends its time here: where all tensors are stacked, a loop over what is known.
        self._direct = len(self._stacked) == len(self._tensors)
        self._unfinished: list[Future[float]] = []
        self.expert_disk_bytes = sum(t.disk_bytes for t in self._tensors)
        """Bytes that one load reads."""

    def pieces(self, expert: int) -> list[tuple[int, int, int]]:
        """Returns file descriptor, offset and length of each piece of an expert on disk."""
        places = [(*tensor.place(expert), tensor.disk_bytes) for tensor in self._tensors]
        return [(self._files.fd(path), offset, nbytes) for path, offset, nbytes in places]

    def read(self, loads: Sequence[Load]) -> list[float]:
        """Reads experts into their slots and returns when all are there.

        Args:
            loads: What to read where.

        Returns:
            Seconds that each took, in the order of `loads`.

        Raises:
            CheckpointError: If a file ends early or cannot be read.
        """
        if len(loads) > 1 and len(loads) * self.expert_disk_bytes >= PARALLEL_BYTES:
            # Remembered before anything can be interrupted: a reader that is still at work may
            # write into its slot later, so the next event waits for it (see `settle`).
            self._unfinished = [self._files.pool.submit(self.read_one, load) for load in loads]
            seconds = [future.result() for future in self._unfinished]
            self._unfinished = []
            return seconds
        return [self.read_one(load) for load in loads]

    def settle(self) -> None:
        """Waits for readers that an interrupted event left behind."""
        if self._unfinished:
            for future in self._unfinished:
                future.cancel()
            wait_for(self._unfinished)
            self._unfinished = []

    def read_one(self, load: Load) -> float:
        """Reads one expert into its slot; returns the seconds it took."""
        begin = time.perf_counter()
        expert, slot, _ = load
        if self._direct:
            try:
                for fd, start, nbytes, slots in self._stacked:
                    if os.preadv(fd, (slots[slot],), start + expert * nbytes) != nbytes:
                        break  # cut short, or the file ended: below, with the error that says so
                else:
                    return time.perf_counter() - begin
            except OSError:
                pass  # again below, where the error says which expert of which file
        for tensor in self._tensors:
            path, offset = tensor.place(load.expert)
            row = tensor.slots[load.slot]
            if tensor.widen:
                narrow = np.empty(tensor.disk_bytes, np.uint8)
                self._fill(narrow, path, offset, tensor.name, load.expert)
                _to_float32(narrow, tensor.spans[0].dtype, row)
            else:
                self._fill(row, path, offset, tensor.name, load.expert)
        return time.perf_counter() - begin

    def _fill(self, row: np.ndarray, path: Path, offset: int, name: str, expert: int) -> None:
        try:
            fd = self._files.fd(path)
            got = os.preadv(fd, [row.data], offset)
            while got < row.nbytes:
                more = os.preadv(fd, [row[got:].data], offset + got)
                if more == 0:
                    raise CheckpointError(
                        f"{path} ended at byte {offset + got} while {name} of expert {expert} was "
                        "read: the file was changed or cut off since the model was loaded. "
                        "Restore it and load the model again."
                    )
                got += more
        except OSError as error:
            raise CheckpointError(
                f"Reading {name} of expert {expert} from {path}: {error}"
            ) from error


def _to_float32(narrow: np.ndarray, dtype: str, row: np.ndarray) -> None:
    """Writes 16-bit floats, given as bytes, into `row` as float32; exact."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        np.left_shift(narrow.view(np.uint16), 16, out=row.view(np.uint32), dtype=np.uint32)
    else:
        row.view(np.float32)[:] = narrow.view(np.float16)
