"""Which experts serve which text, which policy keeps the right ones, and whether pins help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ... import metrics
from ...quality.intervals import paired
from ...quality.recorded import RecordedTexts, record_texts
from ...routing.curves import curves
from ...routing.gaps import belady_gap, skew_and_recency
from ...routing.policies import policy_summary, policy_table
from ..statements import best_set
from .notes import Notes
from .plan import capacities, texts_for

if TYPE_CHECKING:
    import pandas as pd

WHICH = "Which experts serve which text?"
POLICIES = "Which policy, and how far from the bound?"

BOUNDS = ("min", "min_forced")


def recorded(notes: Notes, split: str = "test") -> RecordedTexts:
    """Records the study's texts of a split."""
    scale = notes.scale
    return record_texts(
        notes.lab, texts_for(notes.lab, scale, split), prefix=scale.prefix,
        tokens=scale.record_tokens,
    )  # fmt: skip


def which_experts(notes: Notes) -> None:
    """Measures the routing of the test texts, decoding and prefill apart."""
    from ...plots import layers as plots

    found = recorded(notes)
    routing = found.routing
    table = notes.frame("routing-summary", metrics.summary(routing))
    decode = table[table["phase"] == "decode"]
    mean = decode.drop(columns=["domain", "phase"]).groupby("layer", as_index=False).mean()
    overall = decode.mean(numeric_only=True)
    information = notes.frame(
        "domain-information",
        metrics.domain_information(routing, permutations=notes.scale.permutations, phase="decode"),
    )
    beyond = information[information["given"].eq("token") & information["null"].eq("document")]
    some = beyond[beyond["p"] <= 0.05]
    first, last = beyond.iloc[0], beyond.iloc[-1]
    notes.found(
        WHICH, f"Beyond the token itself, its text's domain tells {first['excess']:.3f} bits of "
        f"the expert in layer {first['layer']} and {last['excess']:.3f} in layer {last['layer']} "
        f"(more than whole documents that change domains give, p ≤ .05, in {len(some)} of "
        f"{len(beyond)} layers; decoding).", "domain-information.csv",
    )  # fmt: skip
    notes.lesson(
        "domain-beyond-token", "the domain tells of the expert beyond the token itself",
        {"mean": beyond["excess"].mean(), "low": np.nan, "high": np.nan}, "bits, mean of layers",
    )  # fmt: skip
    notes.lesson(
        "domain-deep", "it tells more in the last layer than in the first",
        {"mean": last["excess"] - first["excess"], "low": np.nan, "high": np.nan}, "bits",
    )  # fmt: skip
    notes.found(
        WHICH, f"A token shares {overall['overlap']:.0%} of its experts with the token before it "
        f"(chance {overall['overlap_chance']:.0%}) and its first choice in "
        f"{overall['same_first']:.0%} (chance {overall['same_first_chance']:.1%}); 16 tokens "
        f"need {overall['distinct']:.1f} experts a layer (chance "
        f"{overall['distinct_chance']:.1f}); mean of layers and domains, decoding.",
        "routing-summary.csv",
    )  # fmt: skip
    notes.lesson(
        "locality", "a token shares more experts with the token before it than by chance",
        {"mean": overall["overlap"] - overall["overlap_chance"], "low": np.nan, "high": np.nan},
        "share of the experts",
    )  # fmt: skip
    coverage = metrics.pin_coverage(metrics.counts(routing).query("phase == 'decode'"))
    notes.frame("coverage", coverage)
    notes.chart("locality", plots.locality(mean, note=notes.note))
    notes.chart("balance", plots.balance(mean, note=notes.note))
    hits = metrics.segment_hits(routing, phase="decode")
    notes.frame("segments", hits)


def which_policy(notes: Notes) -> None:
    """Replays the test texts under every policy, with the bounds."""
    from ...plots import curves as curve_plots
    from ...plots import study as plots

    lab, scale = notes.lab, notes.scale
    experts = min(site.experts for site in lab.sites)
    found = recorded(notes)
    told: dict[str, Any] = {"documents": found.documents, "experts": experts}
    sizes = [c for c in capacities(lab, scale) if c <= 0.76 * experts]
    table = policy_table(found.recording, capacities=sizes, **told)
    summary = policy_summary(table)
    causal = table[~table["policy"].isin(BOUNDS)]
    best = []
    for capacity, part in causal.groupby("capacity"):
        ranked = best_set(part, "policy", "miss_ratio", cluster="document", weights="slots").assign(
            capacity=capacity
        )
        best.append(ranked)
        equal = ranked[ranked["best"]]["policy"].tolist()
        notes.found(
            POLICIES, f"At {capacity} experts, bank empty before each text: "
            f"{', '.join(f'`{name}`' for name in equal)} cannot be told apart from the best "
            f"({ranked['mean'].iloc[0]:.1%} misses; simultaneous 95%, {len(found.documents)} "
            f"texts). `lru` misses {_of(summary, 'lru', capacity):.1%}, MIN of all events "
            f"{_of(summary, 'min', capacity):.1%}.", "policies.csv", "policies.png",
        )  # fmt: skip
    import pandas as pd

    ranks = pd.concat(best, ignore_index=True)
    members = ranks[["policy", "capacity", "best"]]
    summary = summary.merge(members, on=["policy", "capacity"], how="left")
    summary["best"] = summary["best"].fillna(False).astype(bool)
    notes.frame("policies", summary)
    notes.chart("policies", plots.policies(summary, experts=experts, note=notes.note))
    low = sizes[0]
    for other in ("lfu", "lfru", "lcp", "sieve", "s3_fifo", "lfu_da"):
        at = causal[causal["capacity"].eq(low)]
        row = paired(at, "miss_ratio", "policy", ("lru", other), weights="slots").iloc[0]
        notes.lesson(
            f"lru-{other}", f"LRU misses more than {other.upper()} at {low}, bank empty before "
            "each text", row, "share of the routed slots",
        )  # fmt: skip
    gap = notes.frame(
        "gap", belady_gap(found.recording, "all", capacities=sizes, others="exclude", **told)
    )
    lru = gap[gap["policy"].eq("lru") & gap["capacity"].eq(low)].iloc[0]
    notes.found(
        POLICIES, f"At {low} experts LRU loads {lru['gap']:.1%} [{lru['gap_low']:.1%}, "
        f"{lru['gap_high']:.1%}] of the needed experts more than MIN; {lru['victim_share']:.0%} of "
        f"that is the choice of victims, {lru['admission_share']:.0%} that every miss is admitted "
        "(decoded tokens alone).", "gap.csv",
    )  # fmt: skip
    notes.lesson(
        "gap-victims", f"most of LRU's distance from MIN is the choice of victims, at {low}",
        {"mean": lru["victim_share"] - 0.5, "low": np.nan, "high": np.nan}, "share of the gap − ½",
    )  # fmt: skip
    split = skew_and_recency(found.recording, capacities=sizes, documents=found.documents,
                             experts=experts, within="domain")  # fmt: skip
    notes.frame("skew-recency", split)
    row = split[split["layer"].eq(-1) & split["capacity"].eq(low)].iloc[0]
    notes.found(
        POLICIES, f"LRU at {low}, bank kept from text to text: {row['real']:.1%} hits, of which "
        f"chance {row['chance']:.1%}, favourites of the domain {row['skew']:.1%}, the order of "
        f"tokens within it {row['recency']:.1%}.", "skew-recency.csv",
    )  # fmt: skip
    for name, said in (("skew", "some experts are favourites of a domain"),
                       ("recency", "tokens want what tokens before them wanted")):  # fmt: skip
        # The frame's standard error is that of the shuffles, and says nothing of other texts.
        ends = {"low": np.nan, "high": np.nan}
        notes.lesson(name, f"LRU hits because {said}, at {low}", {"mean": row[name], **ends},
                     "share of the routed slots")  # fmt: skip
    kept = policy_table(found.recording, capacities=[low], reset=None, **told)
    told_kept = policy_summary(kept[~kept["policy"].isin(BOUNDS)]).sort_values("miss_ratio")
    notes.frame("policies-kept", told_kept)
    first = told_kept.iloc[0]
    notes.found(
        POLICIES, f"With the bank kept from text to text, at {low}: `{first['policy']}` misses "
        f"least, {first['miss_ratio']:.1%} (LRU "
        f"{_of(told_kept, 'lru', low):.1%}).", "policies-kept.csv",
    )  # fmt: skip
    # Kept from text to text: emptied before each, first uses would be most of what misses.
    every = curves(found.recording, others="exclude", experts=experts)
    notes.frame("curves", every.overall)
    notes.chart("curves", curve_plots.miss_ratio(every.frame, note=notes.note))


def _of(summary: pd.DataFrame, policy: str, capacity: int) -> float:
    rows = summary[summary["policy"].eq(policy) & summary["capacity"].eq(capacity)]
    return float(rows["miss_ratio"].iloc[0])
