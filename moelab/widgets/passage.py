"""What the explorer shows, from frames alone: tokens, and the routed slots of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SchemaError, StudyError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ["run", "sequence", "step", "position"]
TOKEN_COLUMNS = (*KEYS, "token", "phase", "hits", "misses")
SLOT_COLUMNS = (*KEYS, "layer", "rank", "expert", "weight", "hit")
LIMIT = 20_000
"""Tokens that are looked at unless more are asked for."""

COLOURS = {
    "hit rate": "share of the token's routed slots that were in memory",
    "missed mass": "share of its gate weight that was not in memory",
    "surprise": "negative log-probability of the token, nats",
    "expert's weight": "gate weight of the chosen expert",
}
"""What a token's colour can stand for."""


class Passage:
    """A recording's tokens in the order in which they ran, without padding.

    Args:
        recording: What has `tokens` and `routing` frames of `moelab.routing.columns`.
        limit: Tokens that are looked at, from the first; the rest is left out.

    Attributes:
        tokens: The tokens, a row each.
        total: Tokens that the recording has.

    Raises:
        SchemaError: If a frame lacks a column.
        StudyError: If there is no token.
    """

    def __init__(self, recording: Any, limit: int = LIMIT) -> None:
        tokens, routing = recording.tokens, recording.routing
        _require(tokens, TOKEN_COLUMNS, "tokens")
        _require(routing, SLOT_COLUMNS, "routing")
        tokens = tokens[(tokens["phase"] != "padding").to_numpy()].reset_index(drop=True)
        if tokens.empty:
            raise StudyError("The recording has no tokens, so there is nothing to explore.")
        if limit < 1:
            raise StudyError(f"limit must be positive, got {limit}.")
        self.total = len(tokens)
        self.tokens = tokens.iloc[:limit]
        rows = _token_of(routing, self.tokens)
        kept = np.flatnonzero(rows >= 0)
        # By token, and within it by layer and rank: a token's slots lie side by side.
        order = np.lexsort((routing["rank"].to_numpy()[kept], routing["layer"].to_numpy()[kept],
                            rows[kept]))  # fmt: skip
        kept = kept[order]
        self._slots = routing.iloc[kept].reset_index(drop=True)
        self._token = rows[kept]
        self._start = np.searchsorted(self._token, np.arange(len(self.tokens) + 1))
        self.layers: list[int] = sorted(self._slots["layer"].unique().tolist())
        self.texts: list[str] = self.tokens["token"].astype(str).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def slots(self, token: int) -> pd.DataFrame:
        """Returns a token's routed slots, by layer and rank."""
        return self._slots.iloc[self._start[token] : self._start[token + 1]]

    def uses(self, layer: int) -> pd.Series:
        """Returns how many tokens chose each expert of a layer, the most used first."""
        return self._slots.loc[self._slots["layer"] == layer, "expert"].value_counts()

    def tokens_of(self, layer: int, expert: int) -> pd.DataFrame:
        """Returns the tokens that chose an expert: `token` (place), `text`, `weight`, `hit`."""
        chosen = (self._slots["layer"] == layer) & (self._slots["expert"] == expert)
        places = np.flatnonzero(chosen.to_numpy())
        found = self._slots.iloc[places][["weight", "hit"]].reset_index(drop=True)
        tokens = self._token[places]
        found.insert(0, "token", tokens)
        found.insert(1, "text", [self.texts[token] for token in tokens])
        return found

    def values(
        self, colour: str, layer: int | None = None, expert: int | None = None
    ) -> np.ndarray:
        """Returns what colours each token.

        Args:
            colour: A key of `COLOURS`.
            layer: With `expert`, for `"expert's weight"`: whose.
            expert: With `layer`.

        Returns:
            float64 (tokens,); NaN where a token has no such figure.
        """
        if colour == "hit rate":
            hits, misses = (self.tokens[c].to_numpy(float) for c in ("hits", "misses"))
            with np.errstate(invalid="ignore"):
                return np.asarray(hits / (hits + misses))
        if colour == "surprise":
            if "logprob" not in self.tokens:
                return np.full(len(self), np.nan)
            return -self.tokens["logprob"].to_numpy(float)
        weight = self._slots["weight"].to_numpy(float)
        if colour == "missed mass":
            missed = np.where(self._slots["hit"].to_numpy(bool), 0.0, weight)
            sums = [np.bincount(self._token, w, len(self)) for w in (missed, weight)]
            with np.errstate(invalid="ignore"):
                return np.asarray(sums[0] / sums[1])
        if colour == "expert's weight":
            values = np.full(len(self), np.nan)
            if layer is not None and expert is not None:
                found = self.tokens_of(layer, expert)
                values[found["token"]] = found["weight"].to_numpy(float)
            return values
        raise StudyError(f"colour must be one of {', '.join(COLOURS)}, got {colour!r}.")

    def where(self, token: int) -> str:
        """Says where a token stands, in words."""
        row = self.tokens.iloc[token]
        parts = [f"token {token + 1:,} of {len(self):,}", str(row["phase"])]
        if self.tokens["run"].iloc[-1] != self.tokens["run"].iloc[0]:
            parts.append(f"run {row['run']}")
        return ", ".join([*parts, f"position {row['position']}"])


def shown(text: str) -> str:
    """Returns a token's text so that all of it is seen: line ends, tabs and nothing at all."""
    if not text:
        return "∅"
    seen = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in seen)


def _require(frame: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    for column in columns:
        if column not in frame.columns:
            raise SchemaError(
                f"The recording's {name} lack the column {column!r}; they have "
                f"{', '.join(map(str, frame.columns))}."
            )


def _token_of(routing: pd.DataFrame, tokens: pd.DataFrame) -> np.ndarray:
    """Returns the place in `tokens` of each routed slot; -1 where it is not there."""
    keys = routing[KEYS].to_numpy()
    if not len(keys):
        return np.zeros(0, np.int64)
    # Slots of a token lie side by side, so few keys need to be looked up, not one a slot.
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    at = tokens[KEYS].assign(place=np.arange(len(tokens))).drop_duplicates(KEYS, keep="last")
    found = routing.iloc[first][KEYS].merge(at, how="left", on=KEYS)["place"]
    places = found.fillna(-1).to_numpy(np.int64)
    return np.repeat(places, np.diff(np.r_[first, len(keys)]))
