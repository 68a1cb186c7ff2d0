"""Which part of a file the operating system holds in memory, and asking it to let go.

A read of a file that was read before may come from memory, so a disk speed means nothing unless
one knows. `mincore` says which pages are held (Linux and macOS). Dropping them: `posix_fadvise`
on Linux; on macOS `msync` with `MS_INVALIDATE`, as fio and vmtouch do it. Whether that worked is
not assumed but asked again, and where nobody can tell the answer is None.

The macOS side is written from documentation and has not been run by us; if it does not work there,
the report says "not known", no more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

FOLIO = 4 << 20
"""More than Linux holds together."""

MS_INVALIDATE = 2  # the same on Linux and macOS


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A byte range of a file."""

    path: Path
    offset: int
    nbytes: int


def cached_share(pieces: Iterable[Piece]) -> float | None:
    """Returns how much of the pieces is in memory now, 0 to 1; None if that cannot be known."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    held = pages = 0
    try:
        for address, nbytes in _mapped(pieces):
            state = np.zeros(nbytes // mmap.PAGESIZE, np.uint8)
            into = ctypes.c_void_p(state.ctypes.data)
            if mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), into):
                return None
            held += int(np.count_nonzero(state & 1))
            pages += len(state)
    except (OSError, ValueError):
        return None
    return held / pages if pages else None


def drop(pieces: Iterable[Piece]) -> None:
    """Asks the system to forget the pieces' pages. Ask `cached_share` whether it did."""
    if hasattr(os, "posix_fadvise"):
        for path, group in groupby(sorted(pieces), key=lambda piece: piece.path):
            with path.open("rb", buffering=0) as file:
                for piece in group:
                    # Linux holds several pages in one folio, and keeps a folio of which only a
                    # part is to go.
                    begin = piece.offset // FOLIO * FOLIO
                    end = -(-(piece.offset + piece.nbytes) // FOLIO) * FOLIO
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        _each(pieces, "msync", ctypes.c_int(MS_INVALIDATE))


def _each(pieces: Iterable[Piece], function: str, *arguments: object) -> None:
    try:
        call: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), function)
        for address, nbytes in _mapped(pieces):
            call(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), *arguments)
    except (OSError, AttributeError, ValueError):
        return


def _mapped(pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
    """Yields address and length of each piece, rounded out to pages. Reads nothing."""
    page = mmap.PAGESIZE
    for path, group in groupby(sorted(pieces), key=lambda piece: piece.path):
        with (
            path.open("rb", buffering=0) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        ):
            view = np.frombuffer(mapping, np.uint8)
            start = view.ctypes.data
            try:
                for piece in group:
                    begin = piece.offset // page * page
                    end = -(-(piece.offset + piece.nbytes) // page) * page
                    yield start + begin, end - begin
            finally:
                del view  # the mapping cannot be closed while an array shows it
