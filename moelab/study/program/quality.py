"""How small can it be, and why does it hurt: the parts that judge the constrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...profiling import profile
from ...quality.compare import compare, noise_floor
from ...quality.generation import compare_generation
from ...quality.intervals import clustered, paired
from ...quality.tasks import run_tasks
from ..bytes import facts_of
from ..cliff import cliff
from ..comparators import comparators
from ..statements import best_set, capacities_within
from ..sweep import Sweep, sweep
from .notes import PARTS, Notes
from .plan import ACTIONS, capacities, texts_for

if TYPE_CHECKING:
    import pandas as pd

HOW_SMALL = "How small can it be?"
EQUAL = "What is best for the same memory?"
WHY = "Why does it hurt?"
WRITING = "What does it do to what the model writes?"

ASKED = ("low_bit", "drop")
"""Actions that answer tasks: the most and the least faithful, since tasks take long."""

LOSSY = ("substitute", "reroute", "drop")
"""Actions that keep nothing of a missing expert."""


def how_small(notes: Notes) -> None:
    """Sweeps capacity and miss action, with the comparators, and says what is safe."""
    import pandas as pd

    lab, scale = notes.lab, notes.scale
    texts, sizes = texts_for(lab, scale, "test"), capacities(lab, scale)
    told: dict[str, Any] = {
        "prompts": texts,
        "split": "test",
        "prefix": scale.prefix,
        "tokens": scale.tokens,
    }
    found = sweep(lab, sizes, on_miss=["load", *ACTIONS], out=notes.out / PARTS / "sweep", **told)
    frames = [found.frame]
    if scale.comparators:
        learned = profile(lab, texts_for(lab, scale, "calibration"))  # whom to remove
        frames.append(comparators(lab, capacity=sizes, profile=learned, **told))
    rows = notes.frame("sweep", pd.concat(frames, ignore_index=True))
    notes.frame("points", Sweep(rows, found.settings).points())
    floor = noise_floor(lab, texts, prefix=scale.prefix, tokens=scale.tokens)
    least = notes.frame("noise-floor", floor.summary).iloc[-1]
    notes.found(
        HOW_SMALL, f"Noise floor, exact at {floor.settings['reference_capacity']} experts a layer "
        f"against exact at {floor.settings['capacity']}: KL {least['kl_mean']:g} nats.",
        "noise-floor.csv",
    )  # fmt: skip
    _safe(notes, found.frame)
    _cliffs(notes, found.frame, float(least["ln_ppl_ratio"]))
    _charts(notes, rows, least)
    _same_memory(notes, rows)
    _sizes(notes, rows)


def _safe(notes: Notes, frame: pd.DataFrame) -> None:
    from ...plots import quality as plots

    lossy = frame[frame["on_miss"].isin(ACTIONS)]
    within = notes.frame("within", capacities_within(lossy))
    experts = min(site.experts for site in notes.lab.sites)
    notes.chart("within", plots.capacity_within(within, experts=experts, note=notes.note))
    first = within.iloc[0]
    for action, mine in within.groupby("on_miss", sort=False):
        told = []
        for row in mine.itertuples():
            place = "nowhere" if np.isnan(row.capacity) else f"from {row.capacity:.0f} experts on"
            told.append(f"within {row.tolerance:.0%} {place}")
        notes.found(
            HOW_SMALL, f"`{action}`: {'; '.join(told)} (simultaneous {first['level']:.0%} upper "
            f"bounds of perplexity over {first['points']} points, {first['documents']} texts).",
            "within.csv", "within.png",
        )  # fmt: skip


def _cliffs(notes: Notes, frame: pd.DataFrame, floor: float) -> None:
    for action in ACTIONS:
        curve = frame[frame["on_miss"] == action]
        found = cliff(curve, y="ln_ppl_ratio", cluster="prompt")
        if found.breaks:
            where = (
                f"at {', '.join(f'{x:g}' for x in found.breaks)} "
                f"({found.level:.0%} interval {found.interval[0]:g} to {found.interval[1]:g})"
            )
        else:
            where = ""
        notes.found(
            HOW_SMALL, f"`{action}`: {found.verdict} {where}. {found.why}".replace(" .", "."),
            f"cliff-{action}.png",
        )  # fmt: skip
        notes.chart(f"cliff-{action}", found.plot(note=notes.note, noise_floor=floor))


def _charts(notes: Notes, rows: pd.DataFrame, floor: pd.Series) -> None:
    from ...plots import quality as plots

    for metric in ("kl_mean", "ln_ppl_ratio", "same_top1"):
        least = float(floor[metric])
        axes = plots.frontier(rows, metric, noise_floor=least, note=notes.note)
        notes.chart(f"frontier-{metric}", axes)
        own = rows[rows["on_miss"].isin(["load", *ACTIONS])]
        axes = plots.capacity(own, metric, noise_floor=least, note=notes.note)
        notes.chart(f"capacity-{metric}", axes)


def _same_memory(notes: Notes, rows: pd.DataFrame) -> None:
    """Says which actions cannot be told apart at a few sizes of memory."""
    lossy = rows[~rows["on_miss"].eq("load")].copy()
    points = lossy.drop_duplicates(["on_miss", "capacity"])
    # Sizes at which all of the bank's actions have a point.
    own = points[points["on_miss"].isin(ACTIONS)]
    least = int(own.groupby("on_miss")["bytes"].min().max())
    whole = _whole_bytes(notes, rows)
    over = own[own["bytes"] >= whole].groupby("on_miss", sort=False)["capacity"].min()
    notes.found(
        EQUAL, f"The whole model, which is exact, takes {whole / 1e6:.1f} MB"
        + "".join(f"; `{name}` takes as much or more from {size} experts on"
                  for name, size in over.items()) + ".", "points.csv",
    )  # fmt: skip
    # With as much memory as the whole model takes, nobody would take any of these.
    budgets = sorted(int(b) for b in own["bytes"].unique() if least <= b < whole)
    if not budgets:
        return
    budgets = [budgets[i] for i in sorted({0, len(budgets) // 2, len(budgets) - 1})]
    tables = []
    for budget in budgets:
        fitting = points[points["bytes"] <= budget].sort_values(["bytes", "capacity"])
        best = fitting.groupby("on_miss", sort=False).last().reset_index()
        chosen = lossy.merge(best[["on_miss", "capacity"]], on=["on_miss", "capacity"])
        chosen["setting"] = chosen["on_miss"] + " " + chosen["capacity"].astype(str)
        keep = chosen[["setting", "prompt", "domain", "tokens", "kl_mean", "bytes", "split"]]
        table = best_set(keep, "setting", "kl_mean")
        size = keep.drop_duplicates("setting").set_index("setting")["bytes"]
        table.insert(1, "bytes", table["setting"].map(size))
        table.insert(0, "budget", budget)
        tables.append(table)
        first = ", ".join(
            f"`{row.setting}` ({row.mean:.3g})" for row in table[table["best"]].itertuples()
        )
        others = ", ".join(
            f"`{row.setting}` ({row.mean:.3g})" for row in table[~table["best"]].itertuples()
        )
        notes.found(
            EQUAL, f"In {budget / 1e6:.1f} MB, action and capacity, KL in nats: {first} cannot be "
            f"told apart from the best (simultaneous 95%)."
            + (f" Worse beyond doubt: {others}." if others else ""),
            "equal-bytes.csv", "frontier-kl_mean.png",
        )  # fmt: skip
    import pandas as pd

    notes.frame("equal-bytes", pd.concat(tables, ignore_index=True))


def _whole_bytes(notes: Notes, rows: pd.DataFrame) -> int:
    """Returns what the model takes with all its experts, counted as a sweep counts."""
    facts = facts_of(notes.lab)
    experts = facts.slots_bytes([layer.experts for layer in facts.layers])
    return experts + facts.trunk + int(rows["bytes_cache"].max())


def _sizes(notes: Notes, rows: pd.DataFrame) -> None:
    """Notes what each action costs at half of the experts, and the contrasts that are lessons."""
    import pandas as pd

    lab, scale = notes.lab, notes.scale
    sizes = capacities(lab, scale)
    half = min(sizes, key=lambda c: abs(c - scale.half * min(s.experts for s in lab.sites)))
    low, high = sizes[0], sizes[-1]
    options: dict[str, Any] = {"cluster": "prompt", "weights": "tokens"}
    here = rows[rows["capacity"].eq(half) & rows["on_miss"].isin([*ACTIONS, "pruned"])]
    for row in clustered(here, "ln_ppl_ratio", ["on_miss"], **options).itertuples():
        ratio, ends = np.exp(row.mean), np.exp([row.low, row.high])
        notes.found(
            HOW_SMALL, f"`{row.on_miss}` at {half} experts: perplexity × {ratio:.2f} "
            f"[{ends[0]:.2f}, {ends[1]:.2f}] (95%, by itself).", "points.csv",
        )  # fmt: skip

    def contrast(key: str, statement: str, worse: str, better: str, frame: Any = here) -> None:
        row = paired(frame, "kl_mean", "on_miss", (worse, better), **options).iloc[0]
        notes.lesson(key, statement, row, "nats of KL a token")

    contrast("drop-substitute", f"dropping hurts more than substituting, at {half}", "drop",
             "substitute")  # fmt: skip
    contrast("substitute-reroute", f"substituting hurts more than rerouting, at {half}",
             "substitute", "reroute")  # fmt: skip
    contrast("substitute-low_bit", f"substituting hurts more than 2-bit copies, at {half} (which "
             "take more memory)", "substitute", "low_bit")  # fmt: skip
    if (here["on_miss"] == "pruned").any():
        for action in LOSSY:
            contrast(f"pruned-{action}", f"removing experts for good hurts more than `{action}` "
                     f"with swaps, at {half}", "pruned", action)  # fmt: skip
    for action in ACTIONS:
        mine = rows[rows["on_miss"].eq(action)]
        row = paired(mine, "kl_mean", "capacity", (low, high), **options).iloc[0]
        notes.lesson(
            f"capacity-{action}", f"`{action}` hurts more with {low} experts than with {high}", row,
            "nats of KL a token",
        )  # fmt: skip
    # More experts of other actions in the bytes that the copies take.
    copies = rows[rows["on_miss"].eq("low_bit") & rows["capacity"].eq(low)]
    room = int(copies["bytes"].max())
    other = rows[rows["on_miss"].eq("substitute") & (rows["bytes"] <= room)]
    if not other.empty:
        best = other[other["capacity"].eq(other["capacity"].max())]
        both = pd.concat([copies, best])
        row = paired(both, "kl_mean", "on_miss", ("substitute", "low_bit"), **options).iloc[0]
        notes.lesson(
            "bytes-low_bit", f"2-bit copies with {low} experts hurt less than as many bytes of "
            f"experts with substitutes ({int(best['capacity'].iloc[0])})", row,
            "nats of KL a token",
        )  # fmt: skip


def why(notes: Notes) -> None:
    """Splits the damage at half of the experts by its cause."""
    import pandas as pd

    from ...plots import quality as plots

    lab, scale = notes.lab, notes.scale
    texts = texts_for(lab, scale, "test")
    least = noise_floor(lab, texts[:2], prefix=scale.prefix, tokens=scale.tokens)
    floor = float(least.summary.iloc[-1]["kl_mean"])
    shares, agreement, summaries, arms = [], [], [], []
    with _at(notes, scale.half):
        for action in ACTIONS:
            found = compare(
                lab, texts, on_miss=action, swap_budget=None, prefix=scale.prefix,
                tokens=scale.tokens, arms=True,
            )  # fmt: skip
            assert found.routing_agreement is not None
            shares.append(found.shares.assign(action=action))
            arms.append(found.mean_by_arm().assign(action=action))
            agreement.append(found.routing_agreement.assign(action=action))
            summaries.append(found.summary.assign(action=action))
            whole = found.shares[found.shares["domain"] == "all"].set_index("share")
            row = found.summary.iloc[-1]
            notes.found(
                WHY, f"`{action}` at {lab.capacity} experts: KL {row['kl_mean']:.3f} "
                f"[{row['kl_mean_low']:.3f}, {row['kl_mean_high']:.3f}] nats a token (95%); "
                f"{whole.loc['rerouting', 'mean']:.0%} [{whole.loc['rerouting', 'low']:.0%}, "
                f"{whole.loc['rerouting', 'high']:.0%}] of it is the re-routing that misses cause, "
                f"{whole.loc['inherited', 'mean']:.0%} [{whole.loc['inherited', 'low']:.0%}, "
                f"{whole.loc['inherited', 'high']:.0%}] is inherited from earlier tokens. "
                f"Same likeliest token: {row['same_top1']:.0%}; entropy shift d_z "
                f"{row['entropy_shift_dz']:+.2f}.",
                "arms.csv", "shares.csv", "arms.png",
            )  # fmt: skip
            for share, said in (
                ("rerouting", f"part of the damage of `{action}` is re-routing"),
                ("inherited", f"part of the damage of `{action}` is inherited by later tokens"),
            ):
                notes.lesson(f"{share}-{action}", said, whole.loc[share], "share of the damage")
            _deeper(notes, action, found.routing_agreement)
    notes.frame("comparisons", pd.concat(summaries, ignore_index=True))
    told = notes.frame("shares", pd.concat(shares, ignore_index=True))
    split = notes.frame("arms", pd.concat(arms, ignore_index=True))
    agreed = notes.frame("agreement", pd.concat(agreement, ignore_index=True))
    notes.chart("arms", plots.arms(split, noise_floor=floor, note=notes.note))
    notes.chart("shares", plots.damage_shares(told[told["domain"] == "all"], note=notes.note))
    notes.chart("agreement", plots.agreement(agreed, note=notes.note))


def _deeper(notes: Notes, action: str, agreement: pd.DataFrame) -> None:
    """Notes whether agreement falls with depth, from where it can.

    What the first MoE layer's router sees has been through no expert, so it agrees by construction.
    """
    if len(agreement) < 3:
        return
    nothing = float("nan")
    fall = agreement["agreement"].iloc[1] - agreement["agreement"].iloc[-1]
    notes.lesson(
        f"agreement-{action}", f"under `{action}` routers agree with the full model's less in the "
        "last MoE layer than in the second, the first that can differ",
        {"mean": fall, "low": nothing, "high": nothing}, "share of the experts",
    )  # fmt: skip


def writing(notes: Notes) -> None:
    """Lets the constrained model write and answer."""
    import pandas as pd

    lab, scale = notes.lab, notes.scale
    texts = texts_for(lab, scale, "test")
    # The first texts of each domain, so that prompts are of the same texts as the rest.
    prompts = [t for d in dict.fromkeys(t["domain"] for t in texts)
               for t in [x for x in texts if x["domain"] == d][: scale.generations]]  # fmt: skip
    written, answered = [], []
    with _at(notes, scale.half):
        for action in ACTIONS:
            found = compare_generation(
                lab, prompts, on_miss=action, max_tokens=scale.written, seeds=(0, 1),
                prompt_tokens=scale.prefix,
            )  # fmt: skip
            written.append(found.summary.assign(action=action))
            whole = found.summary[found.summary["domain"] == "all"].set_index("metric")
            nll, loops = whole.loc["nll"], whole.loc["seq_rep_4"]
            notes.found(
                WRITING, f"`{action}` at {lab.capacity} experts: texts fork after "
                f"{whole.loc['same_tokens', 'constrained']:.0f} of {scale.written} tokens on "
                f"average; to the full model they are {nll['difference']:+.3f} "
                f"[{nll['low']:+.3f}, {nll['high']:+.3f}] (95%) nats of −ln p a token from its "
                f"own; seq-rep-4 {loops['full']:.3f} → {loops['constrained']:.3f}.",
                "generation.csv",
            )  # fmt: skip
            for metric, said in (
                ("nll", f"the full model finds what `{action}` writes less likely"),
                ("seq_rep_4", f"`{action}` writes more repetitions"),
            ):
                row = whole.loc[metric]
                notes.lesson(
                    f"{metric}-{action}", said,
                    {"mean": row["difference"], "low": row["low"], "high": row["high"]},
                    "nats a token" if metric == "nll" else "share of 4-grams",
                )  # fmt: skip
            if action in ASKED and scale.tasks and _knows_shell(lab):
                answered.append(_answers(notes, action))
    notes.frame("generation", pd.concat(written, ignore_index=True))
    if answered:
        notes.frame("tasks", pd.concat(answered, ignore_index=True))


def _knows_shell(lab: Any) -> bool:
    """Whether this is a training of the lab model: the tasks are its own."""
    from ... import labmodel

    own = (labmodel.path() / "tokenizer.json").read_bytes()
    theirs = lab.path / "tokenizer.json"
    return bool(theirs.exists() and theirs.read_bytes() == own)


def _answers(notes: Notes, action: str) -> pd.DataFrame:
    from ...labmodel.tasks import shell_tasks

    lab, scale = notes.lab, notes.scale
    found = run_tasks(lab, shell_tasks()[: scale.tasks], on_miss=action)
    row = found.summary.iloc[-1]
    notes.found(
        WRITING, f"`{action}` at {lab.capacity} experts, {scale.tasks} shell questions: "
        f"{row['constrained']:.0%} right, the full model {row['full']:.0%}, difference "
        f"{row['difference']:+.0%} [{row['low']:+.0%}, {row['high']:+.0%}] (95%): {found.verdict}.",
        "tasks.csv",
    )  # fmt: skip
    if found.informative:
        notes.lesson(
            f"tasks-{action}", f"`{action}` answers fewer shell questions rightly",
            {"mean": -row["difference"], "low": -row["high"], "high": -row["low"]},
            "share of the questions",
        )  # fmt: skip
    return found.summary.assign(action=action)


class _at:
    """Has the study's lab at a share of the experts while the block runs."""

    def __init__(self, notes: Notes, share: float) -> None:
        self._lab, self._share = notes.lab, share

    def __enter__(self) -> None:
        self._before = list(self._lab.capacities)
        self._lab.resize(self._share)

    def __exit__(self, *_: object) -> None:
        layers = [site.layer for site in self._lab.sites]
        self._lab.resize(dict(zip(layers, self._before, strict=True)))
