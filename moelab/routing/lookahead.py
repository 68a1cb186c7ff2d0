"""What only a running model can tell of its routers: margins, and how well they are foreseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import StudyError
from .scores import ScorePass, rows

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab
    from ..prompt_texts import Prompts

SCALES = ("logit", "score")
"""What a margin is measured in."""


def router_margins(lab: Lab, tokens: Sequence[int]) -> pd.DataFrame:
    """Says how clear each choice of the full model's routers was: z_(k) − z_(k+1).

    The router's scores, sorted; the margin is between the last one chosen and the first one that
    was not. Where a router selects by probabilities (a softmax over all experts), it is the
    difference of their logarithms, which is that of the logits. Other routers select by their
    logits, or by a family's own score, such as a sigmoid with a correction bias: there it is the
    difference of what is selected by.

    Args:
        lab: The model, with `on_miss="load"`. A bank is used as it is and loads what it lacks.
        tokens: Token ids of a text, which is run from its beginning.

    Returns:
        A row a token and layer: `position` (int32, from 0), `layer` (int16), `margin` (float32;
        infinite where all experts are chosen), `scale` (category: `"logit"` where softmax's
        logarithms were taken, else `"score"`).

    Raises:
        StudyError: If the miss action is lossy, there are no tokens, or the family does not show
            its scores.
    """
    import pandas as pd

    parts = []
    scale: dict[int, str] = {}
    for part in ScorePass(lab, "router_margins").scores(tokens):
        k = part.chosen.shape[1]
        code = scale.setdefault(part.layer, "logit" if _softmax(part.scores) else "score")
        margin = _margin(part.scores, k, logarithm=code == "logit")
        parts.append(
            pd.DataFrame(
                {
                    "position": np.arange(part.position, part.position + len(margin), dtype="i4"),
                    "layer": np.int16(part.layer),
                    "margin": margin,
                    "scale": pd.Categorical([code] * len(margin), categories=SCALES),
                }
            )
        )
    found = pd.concat(parts, ignore_index=True)
    return found.sort_values(["position", "layer"], ignore_index=True)


def lookahead_recall(
    lab: Lab,
    prompts: Prompts | Sequence[int] = None,
    *,
    m: Iterable[int] | None = None,
    ahead: int = 1,
) -> pd.DataFrame:
    """Says how well a layer's choices are foreseen from the layer before.

    A later layer's router is asked about what the current layer's router was given, which is the
    residual as the current layer normalises it. recall@m is the share of the experts that the
    later layer then chose that are among the m that it scored highest so
    (mixtral-offloading, arXiv 2312.17238, §3.2). Nothing is trained.

    Args:
        lab: The model, with `on_miss="load"`.
        prompts: Texts as for `moelab.profile`, run raw (without a chat template) from their
            beginnings; or the token ids of one text.
        m: How many experts are guessed; by default k, 2 k and 4 k.
        ahead: MoE layers to look ahead.

    Returns:
        A row a domain, layer and m: `domain`, `layer` (the one that is foreseen), `ahead`, `m`,
        `tokens` (int64), `recall` (float64), `chance` (float64: of m experts at random, m/E).

    Raises:
        StudyError: If the miss action is lossy, `m` or `ahead` does not fit the model, or the
            family's routers cannot be asked apart.
    """
    import pandas as pd

    sites = {site.layer: site for site in lab.sites}
    layers = list(sites)
    if isinstance(ahead, bool) or not isinstance(ahead, int) or not 1 <= ahead < len(layers):
        raise StudyError(
            f"ahead= must be between 1 and {len(layers) - 1}, the model has {len(layers)} MoE "
            f"layers; got {ahead!r}."
        )
    given = None if m is None else sorted(set(m))
    if given is not None and not all(_count(n, min(s.experts for s in lab.sites)) for n in given):
        raise StudyError(f"m= are numbers of experts of a layer, got {given}.")
    reading = ScorePass(lab, "lookahead_recall")
    pairs = list(zip(layers, layers[ahead:], strict=False))
    found: dict[tuple[str, int, int], float] = {}
    tokens: dict[tuple[str, int], int] = {}
    for domain, ids in _texts(lab, prompts):
        guesses: list[mx.array] = []

        def guess(guesses: list[mx.array] = guesses) -> list[mx.array]:
            guesses[:] = [reading.readers[b].ask(reading.readers[a].args[0]) for a, b in pairs]
            picked = [reading.readers[b].picked for _, b in pairs]
            return [*guesses, *(p for p in picked if p is not None)]

        for _ in reading.run(ids, guess):
            for (_, later), scores in zip(pairs, guesses, strict=True):
                picked = reading.readers[later].picked
                assert picked is not None
                chosen, guessed = rows(picked), np.argsort(-rows(scores), axis=1, kind="stable")
                place = np.argsort(guessed, axis=1)  # of each expert among the guesses
                rank = np.take_along_axis(place, chosen, 1)
                tokens[domain, later] = tokens.get((domain, later), 0) + len(chosen)
                k = sites[later].top_k
                for n in given or sorted({min(k * f, sites[later].experts) for f in (1, 2, 4)}):
                    at = (domain, later, n)
                    found[at] = found.get(at, 0.0) + float((rank < n).mean(1).sum())
    return pd.DataFrame(
        [
            {
                "domain": domain,
                "layer": layer,
                "ahead": ahead,
                "m": n,
                "tokens": tokens[domain, layer],
                "recall": total / tokens[domain, layer],
                "chance": n / sites[layer].experts,
            }
            for (domain, layer, n), total in sorted(found.items(), key=lambda item: item[0][1:])
        ]
    ).sort_values(["domain", "layer", "m"], ignore_index=True)


def _softmax(scores: np.ndarray) -> bool:
    """Whether scores are the probabilities of all experts."""
    return bool(scores.min() >= 0 and np.abs(scores.sum(1) - 1).max() < 1e-2)


def _margin(scores: np.ndarray, k: int, *, logarithm: bool) -> np.ndarray:
    """Returns float32 (tokens,)."""
    if scores.shape[1] == k:
        return np.full(len(scores), np.inf, np.float32)
    best = -np.partition(-scores, (k - 1, k), axis=1)[:, k - 1 : k + 1].astype(np.float64)
    if logarithm:  # a probability that vanished is taken as the least that float32 holds
        best = np.log(np.maximum(best, np.finfo(np.float32).tiny))
    return (best[:, 0] - best[:, 1]).astype(np.float32)


def _count(value: Any, most: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and 1 <= value <= most


def _texts(lab: Lab, prompts: Any) -> Iterable[tuple[str, list[int]]]:
    from ..prompt_texts import texts_of
    from ..prompting import to_tokens

    if isinstance(prompts, Sequence) and prompts and all(_count(t, 1 << 40) or t == 0
                                                         for t in prompts):  # fmt: skip
        return [("all", [int(t) for t in prompts])]
    return [
        (text.domain, to_tokens(lab.tokenizer, text.text, template=False))
        for text in texts_of(prompts)[0]
    ]
