"""From disk into slots: reads experts' tensors by byte range, in place.

An expert's tensors are contiguous pieces of a file: row e of a stacked tensor, a tensor of its
own, or, in a pack file, one record of them all. `os.preadv` reads pieces straight into the slots'
memory: no copy through MLX, no graph, and the cost does not depend on the number of slots. Pieces
that lie side by side on disk are read by one call, wherever their slots are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.headers import TensorSpan
from ..errors import CheckpointError
from .readers import Batch, Files
from .residency import Load

PARALLEL_BYTES = 1 << 20
"""Under this many bytes an event is read by the calling thread: handing over costs more."""

RUN_BYTES = 4 << 20
"""A read of pieces that lie side by side stops growing here, so that threads have equal work."""

RUN_PIECES = 256
"""And here: systems take 1,024 buffers in one call."""


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

    @property
    def stride(self) -> int:
        """Bytes from one expert's row to the next where all are in one span."""
        return self.spans[0].stride or self.disk_bytes

    def place(self, expert: int) -> tuple[Path, int]:
        """Returns the file and offset of an expert's row."""
        if len(self.spans) == 1:
            return self.spans[0].path, self.spans[0].offset + expert * self.stride
        return self.spans[expert].path, self.spans[expert].offset


class Piece(NamedTuple):
    """Bytes that lie side by side on disk and belong to one expert."""

    fd: int
    offset: int
    nbytes: int
    tensors: tuple[TensorRows, ...]
    """Whose rows they are, one after another."""


class Run(NamedTuple):
    """Pieces that lie side by side on disk: one read."""

    fd: int
    offset: int
    nbytes: int
    parts: list[tuple[int, Piece]]
    """Which load each piece is for, in the order of the bytes."""


class ExpertLoader:
    """Reads experts of one layer into its slots.

    Args:
        files: Open files, shared between layers.
        tensors: The layer's tensors by projection and name.
    """

    def __init__(self, files: Files, tensors: Mapping[tuple[str, str], TensorRows]) -> None:
        self._files = files
        self._tensors = tuple(tensors.values())
        # All are opened now: a file that takes another's name later is not the model's.
        self._fds = sorted({files.fd(span.path) for t in self._tensors for span in t.spans})
        self._at: dict[int, list[Piece]] = {}
        self._first: list[Piece] = []
        if all(len(t.spans) == 1 for t in self._tensors):
            # Every expert's pieces are the first's, some strides further on.
            self._first = self._side_by_side(0)
        # Decoding spends its time here: where rows need no conversion, a loop over what is known.
        self._direct = bool(self._first) and not any(t.widen for t in self._tensors)
        self._single: list[tuple[int, int, int, int, np.ndarray]] = []
        self._joined: list[tuple[int, int, int, int, list[np.ndarray]]] = []
        for piece in self._first if self._direct else ():
            known = (piece.fd, piece.offset, piece.tensors[0].stride, piece.nbytes)
            if len(piece.tensors) == 1:
                self._single.append((*known, piece.tensors[0].slots))
            else:
                self._joined.append((*known, [tensor.slots for tensor in piece.tensors]))
        self._batch = Batch()
        self.expert_disk_bytes = sum(t.disk_bytes for t in self._tensors)
        """Bytes that one load reads."""

    @property
    def tensors(self) -> tuple[TensorRows, ...]:
        """The layer's tensors: where their rows are and where they go."""
        return self._tensors

    def pieces(self, expert: int) -> list[tuple[int, int, int]]:
        """Returns file descriptor, offset and length of each piece of an expert on disk."""
        return [(piece.fd, piece.offset, piece.nbytes) for piece in self._pieces(expert)]

    def take(self, other: ExpertLoader, moves: Sequence[tuple[int, int]]) -> None:
        """Copies rows from the slots of another loader of the same layer.

        Args:
            other: The other.
            moves: Slot there and slot here, of each row.
        """
        for mine, theirs in zip(self._tensors, other._tensors, strict=True):
            for source, target in moves:
                mine.slots[target] = theirs.slots[source]

    def read(self, loads: Sequence[Load]) -> list[float]:
        """Reads experts into their slots and returns when all are there.

        Args:
            loads: What to read where.

        Returns:
            Seconds that each took, in the order of `loads`; a read for several is divided by
            bytes.

        Raises:
            CheckpointError: If a file ends early, cannot be read, or was written to since the
                model was loaded.
        """
        if len(loads) > 1 and len(loads) * self.expert_disk_bytes >= PARALLEL_BYTES:
            seconds = self._read_together(loads)
        else:
            seconds = [self.read_one(load) for load in loads]
        # Afterwards, so that what was read is known to be what was loaded.
        self._files.check(self._fds)
        return seconds

    def settle(self) -> None:
        """Waits for readers that an interrupted event left behind."""
        self._batch.abandon()

    def read_one(self, load: Load) -> float:
        """Reads one expert into its slot; returns the seconds it took."""
        begin = time.perf_counter()
        expert, slot, _ = load
        if self._direct:
            # What is cut short or fails is read again below, where the error says which expert.
            try:
                for fd, start, stride, nbytes, slots in self._single:
                    if os.preadv(fd, (slots[slot],), start + expert * stride) != nbytes:
                        break
                else:
                    for fd, start, stride, nbytes, arrays in self._joined:
                        rows = [slots[slot] for slots in arrays]
                        if os.preadv(fd, rows, start + expert * stride) != nbytes:
                            break
                    else:
                        return time.perf_counter() - begin
            except OSError:
                pass
        for piece in self._pieces(expert):
            self._perform([load], Run(piece.fd, piece.offset, piece.nbytes, [(0, piece)]))
        return time.perf_counter() - begin

    def _read_together(self, loads: Sequence[Load]) -> list[float]:
        """Reads many bytes: in the order of the disk, by several threads."""
        seconds = np.zeros(len(loads))
        taken: list[tuple[Run, float]] = []

        def perform(run: Run) -> None:
            begin = time.perf_counter()
            self._perform(loads, run)
            taken.append((run, time.perf_counter() - begin))

        runs = list(
            _runs((n, p) for n, load in enumerate(loads) for p in self._pieces(load.expert))
        )
        # The largest first, so that no thread is left with one when the others are done.
        runs.sort(key=lambda run: run.nbytes, reverse=True)
        # Remembered before anything can be interrupted: a reader that is still at work may write
        # into its slot later, so the next event waits for it (see `settle`).
        self._batch = Batch()
        self._batch.work(self._files, runs, perform)
        for run, time_of_run in taken:
            for number, piece in run.parts:
                seconds[number] += time_of_run * piece.nbytes / run.nbytes
        return list(seconds.tolist())

    def _pieces(self, expert: int) -> list[Piece]:
        """Returns where an expert's bytes are, those side by side together."""
        if self._first:
            return [p._replace(offset=p.offset + expert * p.tensors[0].stride) for p in self._first]
        # Where each expert has tensors of its own, finding what is adjacent is worth keeping.
        if expert not in self._at:
            self._at[expert] = self._side_by_side(expert)
        return self._at[expert]

    def _side_by_side(self, expert: int) -> list[Piece]:
        rows = []
        for tensor in self._tensors:
            path, offset = tensor.place(expert)
            rows.append((self._files.fd(path), offset, tensor.disk_bytes, tensor))
        rows.sort(key=lambda row: row[:2])
        pieces: list[Piece] = []
        for fd, offset, nbytes, tensor in rows:
            last = pieces[-1] if pieces else None
            if last and last.fd == fd and last.offset + last.nbytes == offset:
                whole = last.nbytes + nbytes
                pieces[-1] = Piece(fd, last.offset, whole, (*last.tensors, tensor))
            else:
                pieces.append(Piece(fd, offset, nbytes, (tensor,)))
        return pieces

    def _perform(self, loads: Sequence[Load], run: Run) -> None:
        """Does one read, into the slots of the loads that it is for."""
        buffers: list[Any] = []
        narrow: list[tuple[np.ndarray, TensorRows, np.ndarray]] = []
        owners: list[tuple[TensorRows, int]] = []
        for number, piece in run.parts:
            for tensor in piece.tensors:
                row = tensor.slots[loads[number].slot]
                if tensor.widen:
                    narrow.append((np.empty(tensor.disk_bytes, np.uint8), tensor, row))
                    row = narrow[-1][0]
                buffers.append(row)
                owners.append((tensor, loads[number].expert))
        try:
            whole = os.preadv(run.fd, buffers, run.offset) == run.nbytes
        except OSError:
            whole = False  # again below, where the error says which expert of which file
        if not whole:
            for row, (tensor, expert) in zip(buffers, owners, strict=True):
                self._fill(row, tensor, expert)
        for bytes_read, tensor, row in narrow:
            _to_float32(bytes_read, tensor.spans[0].dtype, row)

    def _fill(self, row: np.ndarray, tensor: TensorRows, expert: int) -> None:
        """Reads one row, however many calls it takes."""
        path, offset = tensor.place(expert)
        try:
            fd = self._files.fd(path)
            got = os.preadv(fd, [row.data], offset)
            while got < row.nbytes:
                more = os.preadv(fd, [row[got:].data], offset + got)
                if more == 0:
                    raise CheckpointError(
                        f"{path} ended at byte {offset + got} while {tensor.name} of expert "
                        f"{expert} was read: the file was changed or cut off since the model was "
                        "loaded. Restore it and load the model again."
                    )
                got += more
        except OSError as error:
            raise CheckpointError(
                f"Reading {tensor.name} of expert {expert} from {path}: {error}"
            ) from error


def _runs(pieces: Iterable[tuple[int, Piece]]) -> Iterator[Run]:
    """Joins pieces that lie side by side, of whichever expert, up to a limit."""
    run: Run | None = None
    for number, piece in sorted(pieces, key=lambda part: part[1][:2]):
        if (
            run is not None
            and run.fd == piece.fd
            and run.offset + run.nbytes == piece.offset
            and run.nbytes + piece.nbytes <= RUN_BYTES
            and len(run.parts) < RUN_PIECES // len(piece.tensors)
        ):
            run.parts.append((number, piece))
            run = run._replace(nbytes=run.nbytes + piece.nbytes)
            continue
        if run is not None:
            yield run
        run = Run(piece.fd, piece.offset, piece.nbytes, [(number, piece)])
    if run is not None:
        yield run


def _to_float32(narrow: np.ndarray, dtype: str, row: np.ndarray) -> None:
    """Writes 16-bit floats, given as bytes, into `row` as float32; exact."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        np.left_shift(narrow.view(np.uint16), 16, out=row.view(np.uint32), dtype=np.uint32)
    else:
        row.view(np.float32)[:] = narrow.view(np.float16)
