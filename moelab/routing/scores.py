"""Reads the scores by which a model's routers choose, while it runs a given text exactly.

A recording holds the chosen experts and their weights, not the scores of all experts. They are read
where the family's own code selects by them (`experts.selection`), so no family's rule is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import StudyError
from ..experts.router import find_unit
from ..experts.selection import Selection

if TYPE_CHECKING:
    from ..experts.router import RouterUnit
    from ..families import SwitchSite
    from ..lab import Lab

CHUNK = 256
"""Tokens a forward pass; the scores of all experts and layers are held for so many."""


class _Seen(Exception):
    """The scores are known, so the rest of the block need not run."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One layer's scores for a few consecutive tokens."""

    layer: int
    position: int
    """Of the first token."""
    scores: np.ndarray
    """float32 (tokens, experts): what the router selects the largest of. In a family with groups of
    experts, as the family masks them."""
    chosen: np.ndarray
    """int32 (tokens, top-k), in no order."""


class ScoreReader(Selection):
    """Notes what a layer's router selects by, and changes nothing.

    Args:
        site: The layer.
        unit: The code that chooses its experts.
    """

    def __init__(self, site: SwitchSite, unit: RouterUnit) -> None:
        super().__init__(site, unit, self._see, lambda: None)
        self.args: tuple[Any, ...] = ()
        """What the router was given last."""
        self.kwargs: Mapping[str, Any] = {}
        self.picked: mx.array | None = None
        self._stop = False

    def ask(self, x: mx.array) -> mx.array:
        """Returns the scores, (…, experts), that this router would give to another input.

        Args:
            x: In the place of its last input.

        Raises:
            StudyError: If the router's scores for it are not seen.
        """
        args, kwargs, picked, scores = self.args, self.kwargs, self.picked, self.scores
        self._stop = True
        try:
            self._unit.module(x, *args[1:], **kwargs)
        except _Seen:
            assert self.scores is not None
            return self.scores
        finally:
            self._stop = False
            self.args, self.kwargs, self.picked, self.scores = args, kwargs, picked, scores
        raise unseen(self._site)

    def select(self, a: mx.array, kth: int, axis: int) -> mx.array | None:
        """As `Selection.select`, and notes what is selected."""
        answer = super().select(a, kth, axis)
        if answer is not None:
            k = self._site.top_k
            self.picked = answer[..., :k] if kth == k - 1 else answer[..., -k:]
        return answer

    def _see(self, scores: mx.array, allowed: mx.array | None, chosen: mx.array | None) -> mx.array:
        if self._stop:
            raise _Seen
        return scores  # selecting by them is what the family does

    def _around_block(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return self._preferring(call, *args, **kwargs)

    _around_router = _around_block


def unseen(site: SwitchSite) -> StudyError:
    """Returns the error for a family whose scores cannot be read."""
    return StudyError(
        f"{type(site.parent).__name__} chooses its experts in a way that is not seen from outside "
        "(no argpartition over their scores), so router margins and lookahead cannot be had for "
        "this family."
    )


class ScorePass:
    """Runs texts through a lab's model and reads its routers' scores.

    Args:
        lab: The model. Its miss action must be `"load"`, so that the pass is the full model's; the
            bank loads what it lacks and is otherwise left alone.
        called: What asks, for messages.

    Raises:
        StudyError: If the lab's miss action is lossy, or the family does not show its scores.
    """

    def __init__(self, lab: Lab, called: str) -> None:
        lab._check_open()
        if lab.miss_action.lossy:
            raise StudyError(
                f"{called} reads the full model's router, and under on_miss={lab.on_miss!r} the "
                "lab is another model. Set lab.on_miss = 'load' first."
            )
        self._lab = lab
        units = {site.layer: find_unit(lab.model, site) for site in lab.sites}
        for site in lab.sites:
            if units[site.layer].kind == "unknown":
                raise unseen(site)
        self.readers = {site.layer: ScoreReader(site, units[site.layer]) for site in lab.sites}

    def run(self, tokens: Sequence[int], each: Callable[[], list[mx.array]]) -> Iterator[int]:
        """Runs a text a chunk at a time, and stops after each chunk with its scores in the readers.

        Args:
            tokens: Token ids.
            each: Makes what is evaluated with a chunk.

        Yields:
            Position of the chunk's first token.

        Raises:
            StudyError: If there are no token ids, or a router did not show its scores.
        """
        from mlx_lm.models.cache import make_prompt_cache

        ids = checked_tokens(tokens)
        cache = make_prompt_cache(self._lab.model)
        installed: list[ScoreReader] = []
        try:
            for reader in self.readers.values():
                installed.append(reader)
                reader.install()
            for start in range(0, len(ids), CHUNK):
                for reader in self.readers.values():
                    reader.scores = reader.picked = None
                self._lab.model(mx.array([ids[start : start + CHUNK]]), cache=cache)
                for reader in self.readers.values():
                    if reader.scores is None or reader.picked is None:
                        raise unseen(reader._site)
                mx.eval(each(), [part.state for part in cache])
                yield start
        finally:
            for reader in reversed(installed):
                reader.remove()
                reader.scores = reader.picked = None
                reader.args, reader.kwargs = (), {}

    def scores(self, tokens: Sequence[int]) -> Iterator[Scores]:
        """Yields the scores of each chunk and layer of a text."""

        def held() -> list[mx.array]:
            return [a for r in self.readers.values() for a in (r.scores, r.picked) if a is not None]

        for start in self.run(tokens, held):
            for layer, reader in self.readers.items():
                assert reader.scores is not None and reader.picked is not None
                yield Scores(layer, start, rows(reader.scores), rows(reader.picked))


def rows(array: mx.array) -> np.ndarray:
    """Returns an array as (tokens, …): float32, or int32 for ids."""
    kind = mx.int32 if mx.issubdtype(array.dtype, mx.integer) else mx.float32
    return np.array(array.astype(kind)).reshape(-1, array.shape[-1])


def checked_tokens(tokens: Sequence[int]) -> list[int]:
    """Returns token ids as a list.

    Raises:
        StudyError: If there is none, or they are no ids.
    """
    ids = list(tokens)
    if not ids or not all(isinstance(t, int | np.integer) and t >= 0 for t in ids):
        raise StudyError(f"A text is given as token ids from 0 on, at least one; got {ids[:5]!r}.")
    return [int(t) for t in ids]
