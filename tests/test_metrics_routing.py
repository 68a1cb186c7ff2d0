"""Routing metrics against brute force written from their definitions, and against chance."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import metrics
from tests.support import traces
from tests.support.traces import Group, Token

E, K = 6, 2
KEY = ["domain", "phase", "layer"]

frames = st.builds(
    traces.random_trace,
    st.integers(0, 10_000),
    experts=st.just(E),
    top_k=st.just(K),
    runs=st.integers(1, 3),
    tokens=st.integers(2, 24),
    domains=st.integers(0, 2),
    varied=st.booleans(),
    sticky=st.sampled_from([0.0, 0.5, 0.9]),
)
quick = settings(max_examples=25, deadline=None)


def check(found: pd.DataFrame, expected: dict[tuple[Any, ...], dict[str, float]], by: Any) -> None:
    """Rows have these keys, each once, and these figures."""
    keys = [tuple(row) for row in found[list(by)].astype(object).to_numpy().tolist()]
    assert sorted(keys) == sorted(expected)
    for key, row in zip(keys, found.to_dict("records"), strict=True):
        for name, value in expected[key].items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), (key, name)


def by_group(frame: pd.DataFrame, of: Callable[[Group], dict[str, float] | None]) -> dict:
    found = {key: of(group) for key, group in traces.groups(frame).items()}
    return {key: value for key, value in found.items() if value is not None}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def pairs(group: Group) -> list[tuple[Token, Token]]:
    return [pair for s in group.stretches() for pair in itertools.pairwise(s)]


@quick
@given(frames)
def test_counts_and_balance(frame: pd.DataFrame) -> None:
    counted = metrics.counts(frame, experts=E)
    assert list(counted.columns) == [*KEY, "expert", "count", "tokens"]
    expected: dict[tuple[Any, ...], dict[str, float]] = {}
    for key, group in traces.groups(frame).items():
        of = Counter(e for _, e in traces.rows_of(group))
        for e in range(E):
            expected[(*key, e)] = {"count": of[e], "tokens": len(group.tokens)}
    check(counted, expected, [*KEY, "expert"])

    def figures(group: Group) -> dict[str, float]:
        of = Counter(e for _, e in traces.rows_of(group))
        n = [of[e] for e in range(E)]
        mu = sum(n) / E
        p = [x / sum(n) for x in n if x]
        return {
            "cv": math.sqrt(sum((x - mu) ** 2 for x in n) / E) / mu,
            # Half the mean difference of two experts ÷ their mean: the same figure otherwise put.
            "gini": sum(abs(a - b) for a in n for b in n) / (2 * E * E * mu),
            "entropy": -sum(x * math.log(x) for x in p) / math.log(E),
        }

    check(metrics.balance(counted), by_group(frame, figures), KEY)


@quick
@given(frames)
def test_domain_specialisation(frame: pd.DataFrame) -> None:
    expected = {}
    for key, group in traces.groups(frame).items():
        for e in range(E):
            share = mean([float(e in t.ids) for t in group.tokens])
            expected[(*key, e)] = {"share": share, "tokens": len(group.tokens)}
    check(metrics.domain_specialisation(frame, experts=E), expected, [*KEY, "expert"])


@quick
@given(frames, st.integers(1, 3))
def test_token_shares(frame: pd.DataFrame, least: int) -> None:
    expected = {}
    for key, group in traces.groups(frame).items():
        for token_id in {t.token_id for t in group.tokens}:
            own = [t for t in group.tokens if t.token_id == token_id]
            for e in {e for t in own for e in t.ids}:
                if len(own) >= least:
                    expected[(*key, token_id, e)] = {
                        "occurrences": len(own),
                        "share": mean([float(e in t.ids) for t in own]),
                    }
    found = metrics.token_shares(frame, least=least, experts=E)
    check(found, expected, [*KEY, "token_id", "expert"])


@quick
@given(frames)
def test_vocabulary_specialisation(frame: pd.DataFrame) -> None:
    def figure(group: Group) -> dict[str, float]:
        best = []
        for token_id in {t.token_id for t in group.tokens}:
            own = [t for t in group.tokens if t.token_id == token_id]
            best.append(max(mean([float(e in t.ids) for t in own]) for e in range(E)))
        return {"share": mean(best), "ids": len(best), "tokens": len(group.tokens)}

    found = metrics.vocabulary_specialisation(frame, experts=E, permutations=2)
    check(found, by_group(frame, figure), KEY)


@quick
@given(frames)
def test_repeats(frame: pd.DataFrame) -> None:
    def figures(group: Group) -> dict[str, float]:
        both = pairs(group)
        shared = [(len({*a.ids} & {*b.ids}), len(a.ids), len(b.ids)) for a, b in both]
        return {
            "pairs": len(both),
            "same_first": mean([float(a.ids[0] == b.ids[0]) for a, b in both]),
            "same_first_chance": 1 / E,
            "any_shared": mean([float(n > 0) for n, _, _ in shared]),
            "any_shared_chance": mean(
                [1 - math.comb(E - a, b) / math.comb(E, b) for _, a, b in shared]
            ),
            "overlap": mean([n / b for n, _, b in shared]),
            "overlap_chance": mean([a / E for _, a, _ in shared]),
        }

    check(metrics.repeats(frame, experts=E), by_group(frame, figures), KEY)


@quick
@given(frames)
def test_working_set(frame: pd.DataFrame) -> None:
    lengths = (1, 2, 3, 5, 8)
    expected = {}
    for key, group in traces.groups(frame).items():
        for n in lengths:
            windows = [
                len({e for t in stretch[i : i + n] for e in t.ids})
                for stretch in group.stretches()
                for i in range(len(stretch) - n + 1)
            ]
            if windows:
                expected[(*key, n)] = {"windows": len(windows), "distinct": mean(windows)}
    check(metrics.working_set(frame, lengths, experts=E), expected, [*KEY, "n"])


@quick
@given(frames)
def test_coactivation(frame: pd.DataFrame) -> None:
    expected = {}
    for key, group in traces.groups(frame).items():
        for i, j in itertools.permutations(range(E), 2):
            own = [t for t in group.tokens if i in t.ids]
            if own:
                expected[(*key, i, j)] = {
                    "count": len(own),
                    "together": sum(j in t.ids for t in own),
                    "share": mean([float(j in t.ids) for t in own]),
                    "rate": mean([float(j in t.ids) for t in group.tokens]),
                }
    check(metrics.coactivation(frame, experts=E), expected, [*KEY, "expert", "other"])


def brute_f1(group: Group, m: int) -> tuple[int, float] | None:
    """Every threshold tried, every (window, token, expert) counted one by one."""
    windows = [s[i : i + m] for s in group.stretches() for i in range(len(s) - m + 1)]
    if not windows:
        return None
    best = 0.0
    for threshold in range(1, m + 1):
        true = predicted = actual = 0
        for window in windows:
            for e in range(E):
                uses = [e in t.ids for t in window]
                active = sum(uses) >= threshold
                actual += sum(uses)
                predicted += m * active
                true += sum(uses) * active
        best = max(best, 2 * true / (predicted + actual))
    return len(windows), best


@quick
@given(frames)
def test_segment_f1(frame: pd.DataFrame) -> None:
    expected = {}
    for key, group in traces.groups(frame).items():
        for m in (1, 2, 5):
            found = brute_f1(group, m)
            if found is not None:
                expected[(*key, m)] = {"windows": found[0], "srp": found[1]}
    check(metrics.segment_f1(frame, (1, 2, 5), experts=E), expected, [*KEY, "m"])


def brute_hits(group: Group, slots: int, m: int) -> float:
    """A cache of sets, one token after another."""
    hits = total = 0
    for stretch in group.stretches():
        cache: set[int] = set()
        used: dict[int, int] = {}
        for t, token in enumerate(stretch):
            hits += len(cache & {*token.ids})
            total += len(token.ids)
            for e in token.ids:
                used[e] = t
            ahead = Counter(e for later in stretch[t + 1 : t + 1 + m] for e in later.ids)
            others = sorted(cache - {*token.ids}, key=lambda e: (-ahead[e], -used[e], e))
            cache = {*token.ids, *others[: slots - len(token.ids)]}
    return hits / total


@quick
@given(frames, st.integers(1, 6))
def test_segment_hits(frame: pd.DataFrame, m: int) -> None:
    found = metrics.segment_hits(frame, m, (1.0, 1.5, 2.5), experts=E)
    expected = {}
    for key, group in traces.groups(frame).items():
        k = max(len(t.ids) for t in group.tokens)
        for ratio in (1.0, 1.5, 2.5):
            slots = math.floor(ratio * k + 0.5)
            expected[(*key, ratio)] = {"slots": slots, "sch": brute_hits(group, slots, m)}
    check(found, expected, [*KEY, "ratio"])


@quick
@given(frames, st.sampled_from([0.2, 0.5, 1.0]))
def test_universal_experts(frame: pd.DataFrame, theta: float) -> None:
    def figure(group: Group) -> dict[str, float]:
        prompts = sorted({t.document for t in group.tokens})
        active = [{e for t in group.tokens if t.document == p for e in t.ids} for p in prompts]
        share = [mean([float(e in own) for own in active]) for e in range(E)]
        k = mean([float(len(t.ids)) for t in group.tokens])
        one = [1 - (1 - k / E) ** sum(t.document == p for t in group.tokens) for p in prompts]
        chance = 0.0
        for outcome in itertools.product((False, True), repeat=len(one)):
            if sum(outcome) >= theta * len(one) - 1e-9:
                chance += math.prod(
                    p if happens else 1 - p for p, happens in zip(one, outcome, strict=True)
                )
        return {
            "prompts": len(prompts),
            "universal": mean([float(s >= theta - 1e-9) for s in share]),
            "chance": chance,
        }

    check(metrics.universal_experts(frame, theta, experts=E), by_group(frame, figure), KEY)


@quick
@given(frames)
def test_missed_mass(frame: pd.DataFrame) -> None:
    expected = {}
    for key, group in traces.groups(frame).items():
        for t in group.tokens:
            missed = sum(w for w, hit in zip(t.weights, t.hits, strict=True) if not hit)
            expected[(*key, t.run, t.sequence, t.position)] = {
                "missed": missed,
                "total": sum(t.weights),
                "share": missed / sum(t.weights),
                "chance": 1 - 4 / E,
            }
    found = metrics.missed_mass(frame, capacity=4, experts=E)
    check(found, expected, [*KEY, "run", "sequence", "position"])


@quick
@given(frames)
def test_regime_ratio(frame: pd.DataFrame) -> None:
    """Here drafts count, rejected or not, and a step of several phases is one of the first."""
    steps: dict[tuple[int, int, int], list[dict]] = {}
    for row in frame.to_dict("records"):
        if row["phase"] != "padding":
            steps.setdefault((row["layer"], row["run"], row["step"]), []).append(row)
    expected = {}
    for (layer, run, step), rows in steps.items():
        union = len({r["expert"] for r in rows})
        tokens = len({(r["sequence"], r["position"]) for r in rows})
        phase = "prefill" if any(r["phase"] == "prefill" for r in rows) else "decode"
        expected[phase, layer, run, step] = {
            "tokens": tokens,
            "union": union,
            "ratio": union / 4,
            "chance": E * (1 - (1 - len(rows) / tokens / E) ** tokens) / 4,
        }
    found = metrics.regime_ratio(frame, 4, experts=E)
    check(found, expected, ["phase", "layer", "run", "step"])


@quick
@given(frames, st.integers(0, 100))
def test_saturation(frame: pd.DataFrame, seed: int) -> None:
    """Against the same tokens routed otherwise, some of them left out."""
    rng = np.random.default_rng(seed)
    other = frame.copy()
    relabel = rng.permutation(E)
    other["expert"] = relabel[other["expert"]].astype(np.int32)
    cut = other["position"] % 5 == 3
    theirs = traces.groups(other[~cut])
    expected = {}
    for key, group in traces.groups(frame).items():
        if key not in theirs:
            continue
        place = {(t.run, t.sequence, t.position): t for t in theirs[key].tokens}
        both = [(t, place.get((t.run, t.sequence, t.position))) for t in group.tokens]
        matched = [(a, b) for a, b in both if b is not None]
        expected[key] = {
            "tokens": len(matched),
            "left_out": len(both) - len(matched),
            "overlap": mean([len({*a.ids} & {*b.ids}) / len(a.ids) for a, b in matched]),
            "chance": mean([len(b.ids) / E for _, b in matched]),
            "same_first": mean([float(a.ids[0] == b.ids[0]) for a, b in matched]),
            "same_set": mean([float({*a.ids} == {*b.ids}) for a, b in matched]),
        }
    check(metrics.saturation(frame, other[~cut], experts=E), expected, KEY)


def entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@quick
@given(st.integers(0, 10_000))
def test_domain_information(seed: int) -> None:
    """I(e; d | v) = H(e | v) − H(e | v, d), from the counts of slots."""
    frame = traces.random_trace(seed, domains=2, runs=4, vocabulary=3)
    found = metrics.domain_information(frame, permutations=2, experts=E)
    by_layer: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for (domain, phase, layer), group in traces.groups(frame).items():
        by_layer.setdefault((phase, layer), []).extend(
            (domain, t.token_id, e) for t in group.tokens for e in t.ids
        )

    def left(slots: list[tuple[str, int, int]], of: Callable[[str, int], Any]) -> float:
        """H(e | of(d, v))."""
        parts: dict[Any, Counter] = {}
        for d, v, e in slots:
            parts.setdefault(of(d, v), Counter())[e] += 1
        return sum(sum(c.values()) * entropy(c) for c in parts.values()) / len(slots)

    expected = {}
    for key, slots in by_layer.items():
        plain, given_token = left(slots, lambda d, v: 0), left(slots, lambda d, v: v)
        for null in ("document", "token"):
            expected[(*key, "nothing", null)] = {
                "bits": plain - left(slots, lambda d, v: d), "of": plain,
            }  # fmt: skip
            expected[(*key, "token", null)] = {
                "bits": given_token - left(slots, lambda d, v: (d, v)), "of": given_token,
            }  # fmt: skip
    check(found, expected, ["phase", "layer", "given", "null"])


# -- what chance gives, and whether the figures find it --------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8)])
def test_uniform_routing_is_at_chance(experts: int, top_k: int) -> None:
    """Within four standard errors, over blocks that are independent of each other."""
    blocks = [traces.uniform_trace(experts, top_k, 4_000, seed) for seed in range(12)]
    frame = metrics.labelled({f"b{i}": block for i, block in enumerate(blocks)})

    def near(found: pd.DataFrame, figure: str, chance: str) -> None:
        values, expected = found[figure].to_numpy(), found[chance].to_numpy()
        error = values.std(ddof=1) / math.sqrt(len(values))
        assert abs(values.mean() - expected.mean()) < 4 * error + 1e-12, figure
        assert error < 0.02 * abs(expected.mean()), "an error this large shows nothing"

    repeats = metrics.repeats(frame, experts=experts)
    for figure in ("any_shared", "overlap"):
        near(repeats, figure, f"{figure}_chance")
    for n, part in metrics.working_set(frame, (2, 8, 32), experts=experts).groupby("n"):
        if n < 32 or experts > 8:
            near(part, "distinct", "chance")
    for _, part in metrics.segment_f1(frame, (4, 16), experts=experts).groupby("m"):
        # The best of several thresholds is never below the best one's expectation, by little.
        assert part["srp"].mean() == pytest.approx(part["chance"].mean(), rel=0.01)
    together = metrics.coactivation(frame, experts=experts)
    near(together.groupby("domain")[["share", "chance"]].mean(), "share", "chance")
    near(metrics.saturation(frame, shifted(frame), experts=experts), "overlap", "chance")
    mass = metrics.missed_mass(frame, capacity=experts // 2, experts=experts)
    near(mass.groupby("domain")[["share", "chance"]].mean(), "share", "chance")


def shifted(frame: pd.DataFrame) -> pd.DataFrame:
    """The choices of the block after, on the tokens of this one."""
    blocks = [part for _, part in frame.groupby("domain", observed=True)]
    moved = [
        own.assign(expert=other["expert"].to_numpy())
        for own, other in zip(blocks, [*blocks[1:], blocks[0]], strict=True)
    ]
    return pd.concat(moved)


def test_balance_of_uniform_routing() -> None:
    """The squared CV is exact in expectation; Gini and entropy are near it for many tokens."""
    found = pd.concat(
        [
            metrics.balance(metrics.counts(traces.uniform_trace(16, 4, 2_000, seed), experts=16))
            for seed in range(60)
        ]
    )
    squared = found["cv"] ** 2
    error = squared.std() / math.sqrt(len(found))
    assert abs(squared.mean() - found["cv_chance"].iloc[0] ** 2) < 4 * error
    for name in ("gini", "entropy"):
        chance, values = found[f"{name}_chance"].iloc[0], found[name]
        error = values.std() / math.sqrt(len(values))
        far = chance if name == "gini" else 1 - chance  # from perfectly even use
        assert abs(values.mean() - chance) < 4 * error + 0.02 * far, name
        assert error < 0.1 * far, "an error this large shows nothing"


def test_segment_hits_of_uniform_routing() -> None:
    """The simulated chance is that of other uniform traces."""
    found = [
        metrics.segment_hits(traces.uniform_trace(16, 2, 3_000, s, length=200), 16, 2.0, seed=99)
        for s in range(8)
    ]
    values = np.array([f["sch"].iloc[0] for f in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - found[0]["chance"].iloc[0]) < 4 * spread * math.sqrt(1 + 1 / 8)
    # A cache of as many slots as a token chooses holds just the last token's experts: k/E hits,
    # but for the first token of each run.
    one = metrics.segment_hits(traces.uniform_trace(16, 2, 10_000, 5), 16, 1.0)
    share = one["sch"].iloc[0]
    assert abs(share - 2 / 16) < 4 * math.sqrt(2 / 16 * 14 / 16 / 20_000)


def test_vocabulary_null() -> None:
    """Where tokens tell nothing the figure is its null's; where they tell all it is 1."""
    frame = traces.uniform_trace(16, 2, 4_000, 3)
    found = metrics.vocabulary_specialisation(frame, permutations=40).iloc[0]
    assert found["share"] < found["null_mean"] + 4 * (found["null_95"] - found["null_mean"])
    assert found["share"] > 1.2 * found["chance"], "which is why k/E alone would mislead"
    told = frame.assign(expert=(frame["token_id"] % 8) * 2 + frame["rank"]).astype(frame.dtypes)
    found = metrics.vocabulary_specialisation(told, permutations=10).iloc[0]
    assert found["share"] == 1 > 2 * found["null_95"]


def documents(seed: int, *, by_domain: float, by_document: float, words: bool) -> pd.DataFrame:
    """Four domains of six documents; experts depend on the domain, the document, and the token."""
    rng = np.random.default_rng(seed)
    parts = []
    for run in range(24):
        domain = run % 4
        tokens = np.arange(60)
        token_id = rng.integers(0, 6, 60) + (2 * domain if words else 0)
        base = token_id % 8
        favourite = rng.integers(8)
        draw = rng.random(60)
        expert = np.where(draw < by_domain, domain, base)
        expert = np.where(draw > 1 - by_document, favourite, expert)
        expert = np.where(rng.random(60) < 0.3, rng.integers(0, 8, 60), expert)
        parts.append(
            pd.DataFrame(
                {
                    "run": run, "sequence": 0, "step": tokens, "position": tokens,
                    "token_id": token_id, "phase": "prefill", "layer": 0, "rank": 0,
                    "expert": expert, "domain": f"d{domain}",
                }
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def p_values(frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    found = metrics.domain_information(frame, permutations=99, experts=8)
    return {(row.given, row.null): row.p for row in found.itertuples()}


def test_domains_that_tell_are_found() -> None:
    found = p_values(documents(0, by_domain=0.3, by_document=0.0, words=False))
    assert found["token", "document"] == found["token", "token"] == 0.01


def test_nulls_agree_where_documents_share_nothing() -> None:
    """With tokens that are independent, permuting documents or tokens comes to the same."""
    frame = documents(1, by_domain=0, by_document=0, words=True)
    found = metrics.domain_information(frame, permutations=200, experts=8)
    found = found[found["given"] == "token"].set_index("null")
    document, token = found.loc["document"], found.loc["token"]
    assert document["null_mean"] == pytest.approx(token["null_mean"], rel=0.1)
    assert document["bits"] == token["bits"] == pytest.approx(token["null_mean"], rel=0.3)


def test_domains_that_tell_nothing_beyond_words() -> None:
    """Domains use other words and documents have favourites: only the cautious null is calm."""
    p = [p_values(documents(s, by_domain=0, by_document=0.4, words=True)) for s in range(20)]
    own = np.array([x["token", "document"] for x in p])
    naive = np.array([x["token", "token"] for x in p])
    assert (own <= 0.05).sum() <= 4  # of 20; 5 or more have a chance under 0.3%
    assert (naive <= 0.05).sum() >= 15, "tokens of a document are not independent"
    found = p_values(documents(0, by_domain=0, by_document=0, words=True))
    assert found["nothing", "document"] == 0.01, "for domains use other words"
    assert found["token", "document"] > 0.05 < found["token", "token"]


# -- other than by chance --------------------------------------------------------------------------


def test_nothing_is_pooled_over_phases() -> None:
    frame = traces.random_trace(5)
    whole = metrics.summary(frame)
    assert set(whole["phase"]) == {"prefill", "decode"}
    makers: list[Callable[..., pd.DataFrame]] = [
        metrics.counts, metrics.repeats, metrics.coactivation, metrics.domain_specialisation,
        metrics.token_shares, metrics.working_set, metrics.segment_f1, metrics.segment_hits,
        metrics.universal_experts, metrics.missed_mass, metrics.vocabulary_specialisation,
    ]  # fmt: skip
    for made in makers:
        assert set(made(frame)["phase"]) == {"prefill", "decode"}, made.__name__
        alone = made(frame, phase="decode", experts=6)
        own = made(frame, experts=6)
        own = own[own["phase"] == "decode"].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, own)


def test_summary() -> None:
    """The same figures as the metrics give one by one, each with its chance."""
    frame = traces.random_trace(8, domains=2)
    found = metrics.summary(frame, n=3, experts=6)
    assert not found.duplicated(KEY).any()
    figures = [name for name in found.columns if f"{name}_chance" in found.columns]
    assert figures == [
        "cv", "gini", "entropy", "same_first", "any_shared", "overlap", "distinct", "srp", "missed",
    ]  # fmt: skip
    assert len(found.columns) == len(KEY) + 1 + 2 * len(figures)
    repeats, f1 = metrics.repeats(frame, experts=6), metrics.segment_f1(frame, [3], experts=6)
    both = found.merge(repeats, on=KEY).merge(f1, on=KEY, how="left", suffixes=("_x", "_z"))
    pd.testing.assert_series_equal(both["overlap_x"], both["overlap_y"], check_names=False)
    pd.testing.assert_series_equal(both["srp_x"], both["srp_z"], check_names=False)
    mass = metrics.missed_mass(frame, experts=6).groupby(KEY)["share"].mean().to_numpy()
    assert found.sort_values(KEY)["missed"].to_numpy() == pytest.approx(mass)


def test_recordings_side_by_side() -> None:
    one, two = traces.random_trace(1), traces.random_trace(2)
    both = metrics.labelled({"x": one, "y": two})
    for made in (metrics.repeats, metrics.working_set, metrics.counts):
        found = made(both, experts=6)
        for name, frame in (("x", one), ("y", two)):
            own = found[found["domain"] == name].drop(columns="domain").reset_index(drop=True)
            alone = made(frame, experts=6).drop(columns="domain")
            pd.testing.assert_frame_equal(own, alone)
    named = metrics.labelled(one, {0: "x", 1: "y", 2: "x"}, {0: "a", 1: "a", 2: "b"})
    assert named.groupby("domain", observed=True)["run"].unique().map(sorted).to_dict() == {
        "x": [0, 2], "y": [1],
    }  # fmt: skip
    assert metrics.universal_experts(named)["prompts"].max() == 2


def test_of_nothing() -> None:
    empty = traces.random_trace(1).iloc[:0]
    for made in (
        metrics.counts, metrics.repeats, metrics.coactivation, metrics.domain_specialisation,
        metrics.token_shares, metrics.working_set, metrics.segment_f1, metrics.segment_hits,
        metrics.universal_experts, metrics.missed_mass, metrics.vocabulary_specialisation,
        metrics.domain_information, metrics.summary,
    ):  # fmt: skip
        found = made(empty)
        assert found.empty and len(found.columns) > 3, made.__name__
    assert metrics.regime_ratio(empty, 4).empty
