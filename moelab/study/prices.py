"""A price per miss: what one missing expert at one token costs in nats.

Everything runs exactly, except that at one token, in one layer, one expert that the router chose
counts as missing and meets a miss action (`experts.forced`). The price is the divergence from the
full model, KL(full ‖ forced), summed over this token's prediction and all later ones to the
window's end: some of the damage falls on later tokens, which attend to what the miss left behind.

For each forced token the rest of the window runs as one exact chunk, in the exact run as in the
forced ones, so that a miss that changes nothing costs exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import StudyError
from ..experts.forced import ForcedLayer, Forcing
from ..experts.misses import MissAction
from ..experts.router import RouterRule, ask_rules
from ..prompt_texts import Prompts
from ..quality.divergence import check_finite, diverge
from ..quality.judge import copied, exactly, one_pass, run_prefix
from ..quality.window import Window, documents_of, few_of_each, windows_of
from .asked import action_label
from .price_sample import Cell, plan

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab
    from .price_results import Prices

ACTIONS = ("drop", "substitute", "low_bit")
"""The actions that are priced unless others are named."""

EACH = 4
"""Shipped texts of each domain, where none are given."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the router chose for one token at one layer, by falling weight."""

    experts: list[int]
    """Ids."""
    weights: list[float]
    """Gate weights; NaN where the block does not show them."""
    margin: float
    """z_(k) − z_(k+1); see `margins_of`."""


def price_misses(
    lab: Lab,
    texts: Prompts = None,
    *,
    on_miss: str | MissAction | Sequence[str | MissAction] = ACTIONS,
    prefix: int = 32,
    tokens: int = 48,
    misses: int = 24,
    positions: int = 4,
    joint: int = 1,
    seed: int = 0,
) -> Prices:
    """Forces single misses in an otherwise exact run and says what each one costs.

    Args:
        lab: The model, at any capacity: the price does not depend on it, only the time does, so
            hold as many experts as fit. It runs exactly meanwhile; afterwards it has its own miss
            action again.
        texts: What to run; see `moelab.compare`. None takes a few of each domain of the shipped
            calibration texts, so that what is learned from prices can be judged on others.
        on_miss: Actions: `"drop"`, `"substitute"`, `"low_bit"`, `"reroute"` or such objects.
        prefix: Tokens of each text before the first that may be forced.
        tokens: Predictions that are judged, a text.
        misses: Forced misses a text and action, spread evenly over layers and the router's ranks.
        positions: Tokens of a text in which they are forced, one in each of so many equal parts
            of the judged tokens' first half: each has at least half of the window after it.
        joint: At so many of those tokens misses are also forced together, for additivity: those
            sampled there in pairs and all at once, and one there with one at the next token.
        seed: Of the sampling.

    Returns:
        Prices, a row a forced miss and action; see `Prices.frame`.

    Raises:
        StudyError: If a text is too short, an action is not to be priced, there are fewer places
            than misses, or logits are NaN.
        MissActionError: If an action cannot be had for this model.
        MoelabError: While the lab is being recorded.
    """
    from tqdm.auto import tqdm

    from .price_results import Prices

    if isinstance(joint, bool) or not isinstance(joint, int) or joint < 0:
        raise StudyError(f"joint is a number of tokens, an int from 0 on, got {joint!r}.")
    named = [on_miss] if isinstance(on_miss, str | MissAction) else list(on_miss)
    if not named:
        raise StudyError(f"on_miss names no action. Price one of {', '.join(ACTIONS)}.")
    documents, called = documents_of(texts, split="calibration")
    if texts is None:
        documents = few_of_each(lab.tokenizer, documents, least=prefix + tokens + 1, each=EACH)
    cut: Any = documents
    windows = windows_of(lab.tokenizer, cut, prefix=prefix, tokens=tokens)
    random = np.random.default_rng(seed)
    layout = {site.layer: site.top_k for site in lab.sites}
    plans = [plan(layout, w.judged, positions, misses, random) for w in windows]
    with exactly(lab):
        runs = _Runs(lab, named)
        for window, cells in zip(tqdm(windows, "prices", unit="text", delay=2), plans, strict=True):
            runs.window(window, cells, joint=joint, random=random)
    settings = {
        "model": lab.name, "fingerprint": lab.fingerprint, "texts": called, "prefix": prefix,
        "tokens": tokens, "misses": misses, "positions": positions, "seed": seed,
        "layers": len(lab.model.layers),
        "normalised": sorted({str(rule.normalises) for rule in runs.rules.values()}),
    }  # fmt: skip
    return Prices(*runs.frames(), settings)


def margins_of(scores: mx.array, allowed: mx.array | None, top_k: int) -> np.ndarray:
    """Returns the router's margin z_(k) − z_(k+1) of each token, float64.

    Args:
        scores: What experts are selected by, (…, experts), higher is better. Where they are a
            softmax, z are its logits (differences of logarithms give them exactly); else z are
            the selection scores themselves, such as logits, or sigmoids with a correction.
        allowed: Experts that the token may choose from; None for all.
        top_k: k.
    """
    z = np.array(scores.astype(mx.float32)).astype(np.float64).reshape(-1, scores.shape[-1])
    if (z >= 0).all() and np.allclose(z.sum(-1), 1, atol=1e-3):
        with np.errstate(divide="ignore"):
            z = np.log(z)
    if allowed is not None:
        z = np.where(np.array(allowed).reshape(z.shape), z, -np.inf)
    top = -np.sort(-z, axis=-1)
    if z.shape[-1] == top_k:
        return np.full(len(z), np.inf)
    with np.errstate(invalid="ignore"):
        return np.asarray(top[:, top_k - 1] - top[:, top_k])


class _Runs:
    """Runs windows, and collects rows."""

    def __init__(self, lab: Lab, actions: Sequence[str | MissAction]) -> None:
        self.lab = lab
        self.rules: dict[int, RouterRule] = ask_rules(lab.model, lab.sites)
        made = [Forcing(lab, action, rules=self.rules) for action in actions]
        self.forcings = {action_label(forcing.action): forcing for forcing in made}
        if len(self.forcings) < len(made):
            raise StudyError(f"on_miss names an action twice: {list(actions)!r:.200}.")
        seen = all(rule.unit.kind != "unknown" for rule in self.rules.values())
        # What only looks at the routers: through it nothing is missing.
        self._look = Forcing(lab, "substitute" if seen else "low_bit", rules=self.rules)
        self._depth = len(lab.model.layers)
        self._rows: list[dict[str, Any]] = []
        self._joint: list[dict[str, Any]] = []

    def window(
        self, window: Window, cells: Sequence[Cell], *, joint: int, random: np.random.Generator
    ) -> None:
        """Prices a window's misses, token by token as the exact run goes on."""
        cache = run_prefix(self.lab.model, window)
        by_token: dict[int, list[Cell]] = {}
        for cell in cells:
            by_token.setdefault(cell[0], []).append(cell)
        together = set(random.permutation(list(by_token))[:joint].tolist())
        for at, token in enumerate(window.fed):
            if at in by_token:
                self._token(window, at, by_token[at], cache, joint=at in together, random=random)
                if at == max(by_token):
                    return
            one_pass(self.lab.model, [token], cache)

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns the rows."""
        import pandas as pd

        from .price_results import JOINT_COLUMNS, PRICE_COLUMNS, typed

        return (
            typed(pd.DataFrame(self._rows), PRICE_COLUMNS),
            typed(pd.DataFrame(self._joint, columns=list(JOINT_COLUMNS)), JOINT_COLUMNS),
        )

    def _token(
        self,
        window: Window,
        at: int,
        cells: Sequence[Cell],
        cache: list[Any],
        *,
        joint: bool,
        random: np.random.Generator,
    ) -> None:
        chosen = self._choices(window, at, cache)
        reference = self._logits(window, at, cache, {}, None)
        misses = [
            (layer, rank, chosen[layer].experts[rank])
            for _, layer, rank in cells
            if rank < len(chosen[layer].experts)  # longcat routes fewer for some tokens
        ]
        if not misses:
            return
        shared = {"document": window.document, "domain": window.domain}
        for action, forcing in self.forcings.items():
            prices = []
            for layer, rank, expert in misses:
                kl = self._kl(
                    window, at, cache, reference, {0: {layer: [expert]}}, forcing, alone=1
                )
                prices.append(float(kl.sum()))
                self._rows.append(
                    {
                        **shared, "position": window.prefix + at, "remaining": len(kl),
                        "layer": layer, "expert": expert, "rank": rank,
                        "weight": chosen[layer].weights[rank], "margin": chosen[layer].margin,
                        "depth": layer / self._depth, "action": action, "price": prices[-1],
                        "price_here": float(kl[0]),
                        "later_share": 1 - kl[0] / kl.sum() if kl.sum() > 0 else float("nan"),
                    }
                )  # fmt: skip
            if not joint:
                continue
            told = {**shared, "position": window.prefix + at, "action": action}
            for kind, places in _sets(len(misses)):
                together: dict[int, list[int]] = {}
                for place in places:
                    together.setdefault(misses[place][0], []).append(misses[place][2])
                kl = self._kl(window, at, cache, reference, {0: together}, forcing)
                self._joint.append(
                    {
                        **told, "kind": kind, "misses": len(places), "joint": float(kl.sum()),
                        "sum": sum(prices[place] for place in places),
                    }
                )  # fmt: skip
        if joint and at + 1 < window.judged:
            self._neighbours(window, at, cache, misses[int(random.integers(len(misses)))], shared)

    def _neighbours(
        self,
        window: Window,
        at: int,
        cache: list[Any],
        miss: tuple[int, int, int],
        shared: dict[str, Any],
    ) -> None:
        """The same layer and rank at this token and at the next: together, and each alone."""
        layer, rank, expert = miss
        after = copied(cache)
        one_pass(self.lab.model, [window.fed[at]], after)
        there = self._choices(window, at + 1, after)[layer].experts
        if rank >= len(there):
            return
        following = there[rank]
        reference = self._logits(window, at, cache, {}, None, split=2)
        first, second = {0: {layer: [expert]}}, {1: {layer: [following]}}
        for action, forcing in self.forcings.items():
            a, b, both = (
                float(self._kl(window, at, cache, reference, misses, forcing, split=2).sum())
                for misses in (first, second, {**first, **second})
            )
            self._joint.append(
                {
                    **shared, "position": window.prefix + at, "action": action,
                    "kind": "neighbours", "misses": 2, "joint": both, "sum": a + b,
                }
            )  # fmt: skip

    def _kl(
        self,
        window: Window,
        at: int,
        cache: list[Any],
        reference: np.ndarray,
        misses: dict[int, dict[int, list[int]]],
        forcing: Forcing,
        *,
        split: int = 1,
        alone: int = 0,
    ) -> np.ndarray:
        """Returns the divergence of every prediction from a token on, nats."""
        logits = self._logits(window, at, cache, misses, forcing, split=split, alone=alone)
        check_finite(
            logits, document=window.document, first_position=window.prefix + at + 1, run="forced"
        )
        return diverge(reference, logits, np.array(window.wanted[at:])).kl

    def _logits(
        self,
        window: Window,
        at: int,
        cache: list[Any],
        misses: dict[int, dict[int, list[int]]],
        forcing: Forcing | None,
        *,
        split: int = 1,
        alone: int = 0,
    ) -> np.ndarray:
        """Runs from a token on: the first `split` tokens one by one, the others as a chunk."""
        mine, model, fed = copied(cache), self.lab.model, window.fed[at:]
        parts = []
        for place in range(min(split, len(fed))):
            if forcing is None or place not in misses:
                parts.append(one_pass(model, fed[place : place + 1], mine))
                continue
            with forcing.missing(misses[place]) as layers:
                parts.append(one_pass(model, fed[place : place + 1], mine))
            if alone and not all(_met(layers, misses[place])):
                raise StudyError(
                    f"The router did not choose the same experts twice at position "
                    f"{window.prefix + at + place} of {window.document!r}: this model is not "
                    "deterministic here, and a price would mean nothing."
                )
        if len(fed) > split:
            parts.append(one_pass(model, fed[split:], mine))
        logits = np.concatenate(parts)
        if forcing is None:
            check_finite(
                logits, document=window.document, first_position=window.prefix + at + 1,
                run="reference",
            )  # fmt: skip
        return logits

    def _choices(self, window: Window, at: int, cache: list[Any]) -> dict[int, Choices]:
        """Looks at what the routers choose for a token; changes nothing."""
        everywhere: dict[int, list[int]] = {site.layer: [] for site in self.lab.sites}
        mine = copied(cache)
        with self._look.missing(everywhere) as layers:
            one_pass(self.lab.model, [window.fed[at]], mine)
        return {number: _choices_of(layer) for number, layer in layers.items()}


def _choices_of(layer: ForcedLayer) -> Choices:
    (event,) = layer.events
    ids = np.array(event.ids).reshape(-1)
    weights = np.full(len(ids), np.nan)
    if event.weights is not None:
        weights = np.array(event.weights.astype(mx.float32)).reshape(-1).astype(np.float64)
    routed = ids < layer.site.experts  # ids past the experts (longcat's) are not routed
    order = [i for i in np.argsort(-weights, kind="stable") if routed[i]]
    margin = float("nan")
    if layer.scores:
        margin = float(margins_of(*layer.scores[0], layer.site.top_k)[0])
    return Choices(ids[order].tolist(), weights[order].tolist(), margin)


def _met(layers: Mapping[int, ForcedLayer], misses: Mapping[int, list[int]]) -> Iterator[bool]:
    for layer, experts in misses.items():
        yield from (layers[layer].asked(expert) == 1 for expert in experts)


def _sets(count: int) -> Iterator[tuple[str, list[int]]]:
    """Yields the sets of misses that are forced together at one token."""
    if count > 2:
        for place in range(0, count - 1, 2):
            yield "pair", [place, place + 1]
    if count > 1:
        yield "all", list(range(count))
