"""Texts that the full and the constrained model write from the same beginning.

A prompt but its last token runs exactly, once for both. From there on each model goes on from its
own words, with the same random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import StudyError
from ..experts.misses import Load, MissAction, checked_budget, resolve_action
from ..lab import PREFILL_STEP, Lab
from .divergence import REFERENCE, check_finite, log_softmax
from .intervals import clustered
from .judge import as_before, copied, one_pass, put_action

if TYPE_CHECKING:
    import pandas as pd

SCORED_AT_ONCE = 64
"""Tokens a forward pass when a text is scored: each has a distribution over the vocabulary."""

BATCH = 8
"""Prompts whose caches are held at once. The miss action is set twice a batch, and setting some
actions means to read every expert."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote."""

    ids: tuple[int, ...]
    """Token ids; the end-of-text token, if it came, is the last."""
    text: str
    """Their text, without end of text."""
    ended: bool
    """Whether it ended by itself and not at the limit."""

    @property
    def words(self) -> tuple[int, ...]:
        """The ids without the end-of-text token."""
        return self.ids[:-1] if self.ended else self.ids


class Beginning:
    """A prompt but its last token, run exactly: both models go on from here.

    The last token is the first that a constrained model reads, so every token of its answer is
    its own. For a judged window that is a prefix of all tokens but the prompt's last.

    Args:
        lab: The model, whose miss action must be `"load"`.
        ids: The prompt's token ids, at least one.
        name: The prompt's name, for messages.
    """

    def __init__(self, lab: Lab, ids: Sequence[int], name: str) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        if lab.miss_action.lossy:
            raise StudyError(f"A prompt is run with on_miss='load', got {lab.on_miss!r}.")
        self.ids = tuple(ids)
        self.name = name
        self._lab = lab
        self._cache = make_prompt_cache(lab.model)
        read = self.ids[:-1]
        for start in range(0, len(read), PREFILL_STEP):  # as mlx-lm's own loop does
            chunk = read[start : start + PREFILL_STEP]
            mx.eval(lab.model(mx.array([chunk]), cache=self._cache))
            mx.eval([part.state for part in self._cache])

    def go_on(self, max_tokens: int, seed: int, sampling: Mapping[str, Any]) -> Written:
        """Writes on under the lab's present miss action, from the bank's initial contents.

        Args:
            max_tokens: Tokens at most.
            seed: Of MLX's random numbers; one is drawn a token, whatever the action.
            sampling: As in `Lab.stream`; what is not given is what the model recommends.
        """
        lab = self._lab
        lab.reset()
        options = {key: value for key, value in sampling.items() if value is not None}
        penalty = options.get("repetition_penalty", lab.sampling.repetition_penalty)
        if penalty != 1.0:
            options["logits_processors"] = [_penalising(self.ids[:-1], penalty)]
        ids, pieces = [], []
        for piece in lab.stream(
            list(self.ids[-1:]), max_tokens, prompt_cache=copied(self._cache), seed=seed, **options
        ):
            ids.append(int(piece.token))
            pieces.append(piece.text)
        ended = ids[-1] in lab.tokenizer.eos_token_ids
        return Written(tuple(ids), "".join(pieces), ended)

    def score(self, written: Written) -> float:
        """Returns the mean of −ln p a token, in nats, under the lab's present miss action.

        The end-of-text token counts as a token that was written.

        Raises:
            StudyError: If a logit is NaN or infinite.
        """
        self._lab.reset()
        cache = copied(self._cache)
        fed = [self.ids[-1], *written.ids[:-1]]
        total = 0.0
        for at in range(0, len(fed), SCORED_AT_ONCE):
            logits = one_pass(self._lab.model, fed[at : at + SCORED_AT_ONCE], cache)
            check_finite(
                logits, document=self.name, first_position=len(self.ids) + at, run=REFERENCE
            )
            wanted = np.array(written.ids[at : at + SCORED_AT_ONCE])
            total -= float(log_softmax(logits)[np.arange(len(wanted)), wanted].sum())
        return total / len(fed)


def _penalising(before: Sequence[int], penalty: float) -> Any:
    """Returns mlx-lm's repetition penalty, made to see the part of the prompt in the cache."""
    from mlx_lm.sample_utils import make_logits_processors

    (own,) = make_logits_processors(repetition_penalty=penalty)
    known = mx.array(list(before), mx.uint32)

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return own(mx.concatenate([known, tokens.astype(mx.uint32)]), logits)

    return processor


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt with a name."""

    name: str
    domain: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """What both models wrote from one prompt with one seed."""

    ask: Ask
    seed: int
    full: Written
    constrained: Written
    nll_full: float = float("nan")
    """Of the full model's text, nats a token, under the full model; NaN where not asked for."""
    nll_constrained: float = float("nan")
    """Of the constrained model's text, nats a token, under the full model."""

    @property
    def fork(self) -> int | None:
        """Place of the first token that differs, from 0; None where all are the same."""
        return first_fork(self.full.ids, self.constrained.ids)


def first_fork(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Returns where two lists of tokens first differ, from 0; None if they are the same.

    Where one ends and the other goes on, that is the place.
    """
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))


def pairs(
    lab: Lab,
    asks: Sequence[Ask],
    on_miss: str | MissAction,
    *,
    swap_budget: int | None,
    max_tokens: int,
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
    scored: bool,
    progress: bool,
) -> tuple[list[Pair], dict[str, Any]]:
    """Lets both models write from each prompt with each seed.

    Afterwards the lab has its own action again, also after an error or an interrupt. Its bank
    begins every text from its declared initial contents.

    Args:
        lab: The model.
        asks: The prompts.
        on_miss: What happens on a miss in the constrained run.
        swap_budget: See `moelab.load`.
        max_tokens: Tokens that each text has at most.
        seeds: Each gives a pair a prompt.
        sampling: See `Beginning.go_on`.
        scored: Also score both texts under the full model.
        progress: Show a progress bar.

    Returns:
        The pairs, by prompt and then by seed, and what the constrained lab was, its bank's initial
        contents with it: see `routing.session.manifest`.
    """
    from tqdm.auto import tqdm

    from ..routing.session import manifest

    found: list[Pair] = []
    said: dict[str, Any] = {}
    bar = tqdm(
        total=len(asks) * len(seeds), desc="generation", unit="pair", disable=not progress,
        leave=False,
    )  # fmt: skip
    with bar, as_before(lab):
        for at in range(0, len(asks), BATCH):
            batch = asks[at : at + BATCH]
            put_action(lab, Load(), None)
            starts = [(ask, Beginning(lab, ask.ids, ask.name)) for ask in batch]
            runs = [(ask, start, seed) for ask, start in starts for seed in seeds]
            full = [start.go_on(max_tokens, seed, sampling) for _, start, seed in runs]
            put_action(lab, on_miss, swap_budget)
            said = said or manifest(lab)
            limited = []
            for _, start, seed in runs:
                limited.append(start.go_on(max_tokens, seed, sampling))
                bar.update()
            if scored:
                put_action(lab, Load(), None)
            for (ask, start, seed), a, b in zip(runs, full, limited, strict=True):
                scores = (start.score(a), start.score(b)) if scored else ()
                found.append(Pair(ask, seed, a, b, *scores))
    return found, said


def chosen_action(
    lab: Lab, on_miss: str | MissAction | None, swap_budget: int | None
) -> tuple[MissAction, int | None]:
    """Returns the action and swap budget that a caller means: without an action, the lab's own."""
    if on_miss is None:
        return lab.miss_action, lab.swap_budget if swap_budget is None else swap_budget
    return resolve_action(on_miss), checked_budget(swap_budget)


def checked_run(
    lab: Lab, seeds: Iterable[int], max_tokens: int, sampling: Mapping[str, Any]
) -> list[int]:
    """Checks what both comparisons of generations are asked for; returns the seeds.

    Raises:
        StudyError: If something is out of range.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise StudyError(f"max_tokens is a number of tokens, an int from 1 on, got {max_tokens!r}.")
    listed = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    whole = [s for s in listed if isinstance(s, int | np.integer) and not isinstance(s, bool)]
    if not listed or len(whole) != len(listed) or min(whole) < 0 or len(set(whole)) != len(whole):
        raise StudyError(
            "seeds are different ints from 0 on, at least one, such as seeds=(0, 1), got "
            f"{seeds!r}."
        )
    # Refuses what no sampler takes, before anything runs.
    dataclasses.replace(lab.sampling, **{k: v for k, v in sampling.items() if v is not None})
    if _in_force(lab, sampling)["temperature"] == 0 and len(whole) > 1:
        raise StudyError(
            f"At temperature 0 nothing is drawn, and {len(whole)} seeds would give the same text "
            "so many times. Give one seed, or a temperature."
        )
    return [int(seed) for seed in whole]


def run_settings(
    lab: Lab,
    said: Mapping[str, Any],
    max_tokens: int,
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what must be known to make a comparison of generations again.

    Args:
        lab: The model.
        said: What `pairs` says of the constrained lab.
        max_tokens: As given.
        seeds: As given.
        sampling: As given; what is not given is filled in.
    """
    return {
        **{name: value for name, value in said.items() if name not in ("generations", "problems")},
        "reference": "the same, with every expert computed",
        "prefix": "the prompt but its last token, run exactly",
        "max_tokens": max_tokens,
        "seeds": list(seeds),
        "sampling": _in_force(lab, sampling),
    }


def _in_force(lab: Lab, sampling: Mapping[str, Any]) -> dict[str, Any]:
    recommended = lab.sampling.as_dict()
    return {
        key: recommended[key] if sampling.get(key) is None else sampling[key] for key in SAMPLING
    }


def paired_means(
    prompts: Sequence[str],
    domains: Sequence[str],
    full: Sequence[float] | None,
    constrained: Sequence[float],
    *,
    share: bool = False,
) -> pd.DataFrame:
    """Gives means of both runs over pairs, and of their difference with a 95% interval.

    Args:
        prompts: Each pair's cluster.
        domains: Each pair's domain, the stratum.
        full: The full model's figures; None for a figure of the pair itself.
        constrained: The constrained model's, or the pair's. Pairs with NaN in either are left out.
        share: Figures are 0 or 1.

    Returns:
        A row a domain, then one for `"all"` if that is no domain: `domain`, `full`, `constrained`,
        `difference`, `low`, `high` (float64), `pairs`, `clusters` (int64). Means weigh each pair
        the same. Intervals are paired and clustered, see `intervals.clustered`. Where no pair
        differs in a share, that is not certain of other prompts, and the interval is that of 0 of
        n clusters (Clopper and Pearson, Biometrika 26, 1934). NaN where no pair counts.
    """
    import pandas as pd

    frame = pd.DataFrame({"prompt": list(prompts), "domain": list(domains)})
    frame["b"] = np.asarray(constrained, np.float64)
    frame["a"] = np.nan if full is None else np.asarray(full, np.float64)
    frame["gap"] = frame["b"] - (0.0 if full is None else frame["a"])
    groups = [(name, frame[frame["domain"] == name]) for name in dict.fromkeys(frame["domain"])]
    if "all" not in set(frame["domain"]):
        groups.append(("all", frame))
    rows = []
    for name, group in groups:
        kept = group[group["gap"].notna()]
        if not len(kept):
            rows.append((name, *[np.nan] * 5, 0, 0))
            continue
        found = clustered(kept, "gap", cluster="prompt").iloc[0]
        mean, low, high = found["mean"], found["low"], found["high"]
        if share:
            low, high = _share_limits(kept, low, high)
        if full is None:  # a share or a number of tokens
            low = max(low, 0.0)
        rows.append((name, kept["a"].mean(), kept["b"].mean(), mean, low, high, len(kept),
                     int(found["documents"])))  # fmt: skip
    columns = ["domain", "full", "constrained", "difference", "low", "high", "pairs", "clusters"]
    return pd.DataFrame(rows, columns=columns)


def _share_limits(kept: pd.DataFrame, low: float, high: float) -> tuple[float, float]:
    """Returns limits of a share, or of a difference of shares, that know what 0 of n says."""
    gaps, clusters = kept["gap"].to_numpy(), len(kept[["domain", "prompt"]].drop_duplicates())
    unseen = 1.0 - (ALPHA / 2) ** (1.0 / clusters)
    if (gaps == gaps[0]).all():
        low, high = gaps[0] - unseen, gaps[0] + unseen
    return max(low, -1.0), min(high, 1.0)


def interval_text(row: Mapping[str, Any], form: str) -> str:
    """Writes a row's difference with its interval, such as "+0.31 [+0.20, +0.42]"."""
    value = format(row["difference"], form)
    if np.isnan(row["low"]):
        return f"{value} (no interval: it takes two prompts)"
    return f"{value} [{format(row['low'], form)}, {format(row['high'], form)}]"


ALPHA = 0.05
"""Intervals cover 95%."""
