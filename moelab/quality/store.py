"""Arrays that wait for the other run: in memory up to a budget, else in a file without a name.

The file is gone when nothing refers to it any more, whatever happens to the process.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

KEPT_BYTES = 64_000_000
"""Bytes of one window's logits that are kept in memory, and as many of its arms' arrays."""


class Rows:
    """Logits of a window's judged tokens.

    Args:
        rows: How many there will be.
        vocabulary: Logits a row.
        kept_bytes: Held in memory up to this size; None for `KEPT_BYTES`.
    """

    def __init__(self, rows: int, vocabulary: int, kept_bytes: int | None = None) -> None:
        self._file: Any = None
        self._array: np.ndarray
        if 4 * rows * vocabulary <= (KEPT_BYTES if kept_bytes is None else kept_bytes):
            self._array = np.empty((rows, vocabulary), np.float32)
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
            self._array = np.memmap(self._file, np.float32, "w+", shape=(rows, vocabulary))

    @property
    def in_file(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def put(self, at: int, logits: np.ndarray) -> None:
        """Keeps some rows from a place on."""
        self._array[at : at + len(logits)] = logits

    def get(self, start: int, stop: int) -> np.ndarray:
        """Returns some rows, (rows, vocabulary), float32."""
        return np.asarray(self._array[start:stop])


@dataclass(frozen=True, slots=True)
class Kept:
    """Where an array is."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    nbytes: int
    data: np.ndarray | None
    """Its bytes; None where they are in the file."""
    offset: int
    """Where in the file."""


class ArrayStore:
    """Holds copies of arrays, bit for bit.

    Args:
        kept_bytes: Held in memory up to this size; None for `KEPT_BYTES`.
    """

    def __init__(self, kept_bytes: int | None = None) -> None:
        self._room = KEPT_BYTES if kept_bytes is None else kept_bytes
        self._file: Any = None
        self._end = 0

    def put(self, value: Any) -> Any:
        """Keeps every array in a value; see `mapped`.

        Returns:
            The same with a `Kept` in each array's place, for `get`.
        """
        return mapped(value, self._keep, mx.array)

    def get(self, kept: Any) -> Any:
        """Returns what was put, as new arrays."""
        return mapped(kept, self._fetch, Kept)

    def _keep(self, array: mx.array) -> Kept:
        flat = array.reshape(-1)
        data = np.array(flat.view(mx.uint8) if flat.size else mx.zeros(0, mx.uint8))
        if data.nbytes <= self._room:
            self._room -= data.nbytes
            return Kept(array.dtype, array.shape, data.nbytes, data, 0)
        self._room = 0  # later ones go to the file too: memory is not for the small ones
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._file.seek(self._end)
        self._file.write(data)
        kept = Kept(array.dtype, array.shape, data.nbytes, None, self._end)
        self._end += data.nbytes
        return kept

    def _fetch(self, kept: Kept) -> mx.array:
        data = kept.data
        if data is None:
            data = np.empty(kept.nbytes, np.uint8)
            self._file.seek(kept.offset)
            self._file.readinto(data)
        if not kept.nbytes:
            return mx.zeros(kept.shape, kept.dtype)
        return mx.array(data).view(kept.dtype).reshape(kept.shape)


def mapped(value: Any, function: Callable[[Any], Any], leaf: type) -> Any:
    """Returns a value with every leaf in it replaced; nothing of the value itself changes.

    Lists, tuples, dicts and the caches of mlx-lm's families are gone through, caches within caches
    too. Their attributes are read, not their `state`: not every family's can be set.
    """
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(item, function, leaf) for item in value])
    if isinstance(value, dict):
        return {key: mapped(item, function, leaf) for key, item in value.items()}
    if type(value).__module__.startswith("mlx_lm.") and hasattr(value, "__dict__"):
        twin = copy.copy(value)
        twin.__dict__.update(mapped(vars(value), function, leaf))
        return twin
    return value
