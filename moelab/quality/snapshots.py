"""The full run's cache before each pass, so that a constrained pass can start from it.

Memory: of a plain key-value cache only what each pass adds is kept, so all passes together take
as much as the cache at the window's end. Of other caches (recurrent states, sliding windows,
lists of caches) the whole state is kept for each pass, and beyond `store.KEPT_BYTES` on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .store import ArrayStore


class Snapshots:
    """The caches of one run of a window, by pass.

    Args:
        store: Keeps the arrays.
    """

    def __init__(self, store: ArrayStore) -> None:
        self._store = store
        self._passes: list[list[tuple[bool, Any]]] = []
        """By pass and layer: whether what is kept is what the pass added, and what."""

    def note(self, cache: Sequence[Any], tokens: int) -> None:
        """Keeps a cache after a pass.

        Args:
            cache: mlx-lm's, a part a layer.
            tokens: Tokens of the pass.
        """
        kept: list[tuple[bool, Any]] = []
        for part in cache:
            if type(part) is KVCache:
                start, stop = part.offset - tokens, part.offset
                added = part.keys[..., start:stop, :], part.values[..., start:stop, :]
                kept.append((True, self._store.put(added)))
            else:
                kept.append((False, self._store.put(part)))
        self._passes.append(kept)

    def restore(self, cache: list[Any], at: int, tokens: int) -> None:
        """Makes a cache the noted run's after a pass.

        Args:
            cache: One that was the noted run's before the pass, and has run it. It is changed.
            at: The pass.
            tokens: Tokens of the pass.
        """
        for layer, (added, kept) in enumerate(self._passes[at]):
            if added:
                cache[layer].trim(tokens)
                cache[layer].update_and_fetch(*self._store.get(kept))
            else:
                cache[layer] = self._store.get(kept)
        mx.eval([part.state for part in cache])
