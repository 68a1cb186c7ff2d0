"""Adds up routed slots to a `Profile`, a prompt at a time, in memory of the profile's own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ProfileError
from .profile import Profile, Use

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 6
"""Significant digits of a gate mass: a weight has seven, and the file is to stay small."""

LOSSLESS = ("load",)
"""Miss actions after which the router sees what it would see in the full model."""


class _Sums:
    """Of one domain and phase; arrays over all experts of all layers, end to end."""

    def __init__(self, width: int) -> None:
        self.prompts = self.tokens = 0
        self.counts = np.zeros(width, np.int64)
        self.mass = np.zeros(width, np.float64)
        self.in_prompts = np.zeros(width, np.int64)


class Tally:
    """Sums that grow.

    Args:
        layers: Numbers of the MoE layers.
        experts: Routed experts of each.
    """

    def __init__(self, layers: Sequence[int], experts: Sequence[int]) -> None:
        self._layers, self._experts = list(layers), list(experts)
        ends = np.cumsum(self._experts)
        self._width = int(ends[-1])
        # A routed slot's place in the arrays is its layer's start plus its expert.
        self._starts = np.full(max(self._layers) + 1, self._width, np.int64)
        self._starts[self._layers] = ends - self._experts
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._active = np.zeros(self._width, np.int64)
        self._prompts = 0

    def add(
        self,
        routing: pd.DataFrame,
        tokens: pd.DataFrame,
        domain: str,
        lengths: Mapping[str, int],
        whole: int,
    ) -> None:
        """Adds recorded frames.

        Args:
            routing: A recording's `routing`.
            tokens: Its `tokens`.
            domain: What the text was.
            lengths: Tokens of a stretch by phase; phases that are not named are left out.
            whole: Tokens of a whole prompt, phases together.
        """
        keys = ["run", "sequence", "step", "position"]
        seen = tokens.loc[tokens["phase"].isin(list(lengths)), [*keys, "phase"]].copy()
        if not len(seen):
            return
        seen["whole"] = _stretches(seen, ["run", "sequence"], whole)
        for phase, length in lengths.items():
            at = seen["phase"] == phase
            seen.loc[at, "part"] = _stretches(seen[at], ["run", "sequence"], length)
        slots = routing[[*keys, "layer", "expert", "weight"]].merge(seen, on=keys)
        place = self.place(slots["layer"].to_numpy(), slots["expert"].to_numpy())
        self._prompts += int(seen["whole"].max()) + 1
        self._active += _distinct(slots["whole"].to_numpy(), place, self._width)
        for phase in lengths:
            of_phase, tokens_of = slots["phase"] == phase, seen["phase"] == phase
            if tokens_of.any():
                self._note(
                    domain, phase, int(tokens_of.sum()), place[of_phase],
                    slots.loc[of_phase, "weight"].to_numpy(),
                    slots.loc[of_phase, "part"].to_numpy().astype(np.int64),
                    int(seen.loc[tokens_of, "part"].max()) + 1,
                )  # fmt: skip

    def add_prompt(self, domain: str, tokens: int, place: np.ndarray, weight: np.ndarray) -> None:
        """Adds one prompt's routed slots.

        Args:
            domain: What the text was.
            tokens: How many tokens it has.
            place: From `place`, (slots,).
            weight: Gate weights, (slots,); NaN where not known.
        """
        prompt = np.zeros(len(place), np.int64)
        self._prompts += 1
        self._active += _distinct(prompt, place, self._width)
        self._note(domain, "prefill", tokens, place, weight, prompt, 1)

    def place(self, layer: np.ndarray | int, expert: np.ndarray) -> np.ndarray:
        """Returns where experts are in the arrays."""
        return self._starts[layer] + expert

    def profile(
        self,
        *,
        model: str,
        fingerprint: str,
        top_k: Sequence[int],
        phase_tokens: Mapping[str, int],
        prompt_tokens: int,
        provenance: Mapping[str, Any],
    ) -> Profile:
        """Returns what has been added so far as a profile.

        Raises:
            ProfileError: If there is no whole prompt.
        """
        if not self._prompts:
            raise ProfileError(
                f"Nothing that was recorded is as long as a prompt of {prompt_tokens} tokens. "
                "Take longer prompts, or shorter ones to count by (tokens=)."
            )
        uses = tuple(
            Use(
                domain, phase, s.prompts, s.tokens,
                self._by_layer(s.counts), self._by_layer(_rounded(s.mass)),
                self._by_layer(s.in_prompts),
            )
            for (domain, phase), s in self._sums.items()
        )  # fmt: skip
        phases = {use.phase for use in uses}
        return Profile(
            model=model,
            fingerprint=fingerprint,
            experts=dict(zip(self._layers, self._experts, strict=True)),
            top_k=dict(zip(self._layers, top_k, strict=True)),
            prompt_tokens=prompt_tokens,
            phase_tokens={phase: n for phase, n in phase_tokens.items() if phase in phases},
            num_prompts=self._prompts,
            activations=self._by_layer(self._active),
            uses=uses,
            provenance=dict(provenance),
        )

    def _note(
        self,
        domain: str,
        phase: str,
        tokens: int,
        place: np.ndarray,
        weight: np.ndarray,
        prompt: np.ndarray,
        prompts: int,
    ) -> None:
        sums = self._sums.setdefault((domain, phase), _Sums(self._width))
        sums.prompts += prompts
        sums.tokens += tokens
        sums.counts += np.bincount(place, minlength=self._width)
        sums.mass += np.bincount(place, weight, minlength=self._width)
        sums.in_prompts += _distinct(prompt, place, self._width)

    def _by_layer(self, values: np.ndarray) -> dict[int, np.ndarray]:
        parts = np.split(values.copy(), np.cumsum(self._experts)[:-1])
        return dict(zip(self._layers, parts, strict=True))


def check_lossless(run: Mapping[str, Any]) -> None:
    """Raises where a recording's manifest says that misses were not simply loaded.

    Raises:
        ProfileError: With what to do instead.
    """
    if run["on_miss"] not in LOSSLESS:
        raise ProfileError(
            f"With on_miss={run['on_miss']!r} a miss changes what the routers choose later, so "
            "this would be no profile of the model. Run it with on_miss='load', which is exact at "
            "every capacity."
        )


def _stretches(tokens: pd.DataFrame, keys: list[str], length: int) -> pd.Series:
    """Numbers whole stretches of `length` tokens, from 0; -1 for what is left over at an end."""
    groups = tokens.groupby(keys, sort=False)
    index, size = groups.cumcount(), groups["step"].transform("size")
    own = (index // length).where(index < size - size % length, -1)
    wholes = groups["step"].size() // length
    first = (wholes.cumsum() - wholes).to_numpy()[groups.ngroup()]
    return (own + first).where(own >= 0, -1)


def _distinct(prompt: np.ndarray, place: np.ndarray, width: int) -> np.ndarray:
    """Returns int64 (width,): in how many prompts each place occurs; prompt -1 is none."""
    inside = prompt >= 0
    pairs = np.unique(prompt[inside].astype(np.int64) * width + place[inside])
    return np.bincount(pairs % width, minlength=width)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{value:.{DIGITS}g}") for value in values])
