"""What the full and the constrained model write from the same prompt, side by side.

Judging a given text asks how well each token is predicted after the right ones. Here each model
goes on from its own words, so that a small change may lead elsewhere, or into a loop. Both runs
start from one exactly run prompt and draw with the same random numbers; both texts are scored
under the full model, since a loop scores well under the weights that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text
from ..errors import StudyError
from ..prompt_texts import Prompts
from ..prompting import Template, to_tokens
from .pairs import (
    SAMPLING,
    Ask,
    Pair,
    checked_run,
    chosen_action,
    interval_text,
    paired_means,
    pairs,
    run_settings,
)
from .repetition import ORDERS, distinct_n, seq_rep_n
from .window import documents_of, few_of_each

if TYPE_CHECKING:
    import pandas as pd

    from ..experts.misses import MissAction
    from ..lab import Lab
    from .window import Document

SHIPPED_PROMPT = 64
"""Tokens of the shipped texts that are prompts where none were given."""

SHIPPED_EACH = 4
"""So many of these a domain."""


@dataclass(frozen=True, eq=False, repr=False)
class GenerationComparison:
    """What `compare_generation` found."""

    frame: pd.DataFrame
    """A row a prompt and seed.

    - `prompt`, `domain` (str), `seed` (int64);
    - `fork` (Int64): place of the first generated token that differs, from 0; NA if none does;
    - `length_full`, `length_constrained` (int64): generated tokens, without end of text;
      `ended_full`, `ended_constrained` (bool): it came to an end by itself;
    - `seq_rep_1_full` … `seq_rep_4_constrained`, `distinct_1_full` … (float64): see
      `quality.repetition`; NaN for texts shorter than n tokens;
    - `nll_full`, `nll_constrained` (float64): mean −ln p a token, nats, of each model's text
      *under the full model*; end of text counts;
    - `text_full`, `text_constrained` (str); `ids_full`, `ids_constrained` (lists of int).
    """
    summary: pd.DataFrame
    """A row a domain and metric, then `domain="all"`.

    `metric`: `forked` (share of pairs), `same_tokens` (tokens before the fork; a pair that never
    forks counts its length), `length`, `ended`, `nll`, `seq_rep_1` … `distinct_4`; `full`,
    `constrained`: means over pairs; `difference` (constrained − full) with `low` and `high`: 95%
    interval, paired and clustered by prompt; `pairs`, `prompts`: how many count. Of `forked` and
    `same_tokens`, which belong to the pair, `full` is NaN and `difference` is the mean itself.
    """
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was run: action, swap budget, initial contents, seeds, sampling, model, versions."""

    def _facts(self) -> dict[str, str]:
        whole = self.summary[self.summary["domain"] == "all"].set_index("metric")
        settings = self.settings
        facts = {
            "model": f"{settings['model']} ({settings['fingerprint']})",
            "constrained": f"on_miss={settings['on_miss']!r} at capacity {settings['capacity']}",
            "texts": f"{len(self.frame)} pairs from {self.frame['prompt'].nunique()} prompts, at "
            f"most {settings['max_tokens']} tokens each, "
            f"temperature {settings['sampling']['temperature']:g}",
            "forked": f"{interval_text(whole.loc['forked'], '.0%')} of pairs; the same "
            f"{whole.loc['same_tokens', 'constrained']:.1f} tokens before",
        }
        for metric, unit in (("nll", " nats a token under the full model"), ("seq_rep_4", "")):
            if metric in whole.index:
                row = whole.loc[metric]
                facts[metric] = (
                    f"{row['full']:.3f} full, {row['constrained']:.3f} constrained: "
                    f"{interval_text(row, '+.3f')}{unit}"
                )
        return facts

    def __repr__(self) -> str:
        return facts_text("GenerationComparison", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("GenerationComparison", self._facts())


def compare_generation(
    lab: Lab,
    prompts: Prompts = None,
    *,
    on_miss: str | MissAction | None = None,
    swap_budget: int | None = None,
    max_tokens: int = 200,
    seeds: Iterable[int] = (0,),
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    template: Template = "auto",
    prompt_tokens: int | None = None,
    progress: bool = True,
) -> GenerationComparison:
    """Lets the full and the constrained model write from the same prompts and seeds.

    The full model is the lab with `on_miss="load"`, whatever fits in memory. A prompt but its last
    token runs exactly, once for both; from there on the one run is exact and the other begins with
    the bank's declared initial contents (see `Lab.reset`), so that nothing that the full model had
    read is still resident.

    Args:
        lab: The model. Afterwards it has its own miss action again, also after an error.
        prompts: Texts, as in `moelab.compare`. None takes the first 64 tokens of some test texts
            that ship with the package, raw.
        on_miss: The constrained run's action; None for the lab's own, with its swap budget.
        swap_budget: Experts a layer that may enter after a step; None for the layer's top-k.
        max_tokens: Generated tokens a text, at most.
        seeds: Each gives a pair a prompt. Both texts of a pair draw the same random numbers.
        temperature: 0 takes the most likely token. This and the next four: what the model
            recommends, unless given.
        top_p: See `Lab.stream`.
        top_k: See `Lab.stream`.
        min_p: See `Lab.stream`.
        repetition_penalty: See `Lab.stream`.
        template: See `Lab.stream`.
        prompt_tokens: Take only so many tokens of each text, raw (no template).
        progress: Show a progress bar.

    Returns:
        The comparison: a row a pair in `.frame`, means with intervals in `.summary`.

    Raises:
        StudyError: If there is no prompt or no seed, a number is out of range, a text is shorter
            than `prompt_tokens`, or a logit is NaN or infinite.
        MissActionError: If the action cannot be had for this model.
        MoelabError: While the lab is being recorded.
    """
    action, budget = chosen_action(lab, on_miss, swap_budget)
    asked = dict(zip(SAMPLING, (temperature, top_p, top_k, min_p, repetition_penalty), strict=True))
    seeds = checked_run(lab, seeds, max_tokens, asked)
    asks = _asks(lab, prompts, template, prompt_tokens)
    found, said = pairs(
        lab, asks, action, swap_budget=budget, max_tokens=max_tokens, seeds=seeds,
        sampling=asked, scored=True, progress=progress,
    )  # fmt: skip
    frame = _frame(found)
    settings = {
        **run_settings(lab, said, max_tokens, seeds, asked),
        "template": template if prompt_tokens is None and prompts is not None else False,
        "prompt_tokens": SHIPPED_PROMPT if prompts is None and not prompt_tokens else prompt_tokens,
    }
    return GenerationComparison(frame, _summary(frame), settings)


def _asks(lab: Lab, prompts: Prompts, template: Template, prompt_tokens: int | None) -> list[Ask]:
    if prompt_tokens is not None and (
        isinstance(prompt_tokens, bool) or not isinstance(prompt_tokens, int) or prompt_tokens < 1
    ):
        raise StudyError(
            "prompt_tokens is a number of tokens, an int from 1 on, or None, got "
            f"{prompt_tokens!r}."
        )
    documents, _ = documents_of(prompts)
    if prompts is None:
        prompt_tokens = prompt_tokens or SHIPPED_PROMPT
        documents = few_of_each(lab.tokenizer, documents, least=prompt_tokens, each=SHIPPED_EACH)
    return [_ask(lab, document, template, prompt_tokens) for document in documents]


def _ask(lab: Lab, document: Document, template: Template, prompt_tokens: int | None) -> Ask:
    ids = to_tokens(lab.tokenizer, document.text, template if prompt_tokens is None else False)
    if prompt_tokens is not None and len(ids) < prompt_tokens:
        raise StudyError(
            f"The text {document.name!r} has {len(ids)} tokens, and prompt_tokens asks for "
            f"{prompt_tokens}. Leave it out, or ask for fewer."
        )
    return Ask(document.name, document.domain, tuple(ids[:prompt_tokens]))


def _frame(found: Sequence[Pair]) -> pd.DataFrame:
    import pandas as pd

    columns: dict[str, Any] = {
        "prompt": [p.ask.name for p in found],
        "domain": [p.ask.domain for p in found],
        "seed": np.array([p.seed for p in found], np.int64),
        "fork": pd.array([p.fork for p in found], dtype="Int64"),
    }
    sides = {"full": [p.full for p in found], "constrained": [p.constrained for p in found]}
    for side, texts in sides.items():
        columns[f"length_{side}"] = np.array([len(t.words) for t in texts], np.int64)
    for side, texts in sides.items():
        columns[f"ended_{side}"] = np.array([t.ended for t in texts], np.bool_)
    for name, measure in (("seq_rep", seq_rep_n), ("distinct", distinct_n)):
        for n in ORDERS:
            for side, texts in sides.items():
                columns[f"{name}_{n}_{side}"] = [measure(t.words, n) for t in texts]
    columns["nll_full"] = [p.nll_full for p in found]
    columns["nll_constrained"] = [p.nll_constrained for p in found]
    for side, texts in sides.items():
        columns[f"text_{side}"] = [t.text for t in texts]
    for side, texts in sides.items():
        columns[f"ids_{side}"] = [list(t.ids) for t in texts]
    return pd.DataFrame(columns)


METRICS = (
    "length", "ended", "nll", *(f"{m}_{n}" for m in ("seq_rep", "distinct") for n in ORDERS)
)  # fmt: skip
"""Figures that each text of a pair has, by their column's beginning."""


SHARES = ("forked", "ended")
"""Figures that are 0 or 1 in each pair."""


def _summary(frame: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    generated = frame["ids_full"].map(len)
    figures = {
        "forked": (None, frame["fork"].notna().astype(float)),
        "same_tokens": (None, frame["fork"].fillna(generated).astype(float)),
        **{
            metric: (frame[f"{metric}_full"].astype(float),
                     frame[f"{metric}_constrained"].astype(float))
            for metric in METRICS
        },
    }  # fmt: skip
    parts = [
        paired_means(
            frame["prompt"], frame["domain"], full, constrained, share=metric in SHARES
        ).assign(metric=metric)
        for metric, (full, constrained) in figures.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    table = table.rename(columns={"clusters": "prompts"})
    names = [
        *dict.fromkeys(frame["domain"]),
        *(["all"] if "all" not in set(frame["domain"]) else []),
    ]
    table["domain"] = pd.Categorical(table["domain"], names)
    table = table.sort_values("domain", kind="stable", ignore_index=True)
    table["domain"] = table["domain"].astype(str)
    return table[
        ["domain", "metric", "full", "constrained", "difference", "low", "high", "pairs", "prompts"]
    ]
