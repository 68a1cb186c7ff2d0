"""Frames as the study makes them, made up for tests of charts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

DOMAINS = ("python", "prose", "math", "spanish", "shell", "guide")
ACTIONS = {"low_bit": 0.004, "substitute": 0.05, "reroute": 0.07, "drop": 0.12}
EXPERTS = 64


def sweep(
    documents: int = 4, capacities: tuple[int, ...] = (16, 24, 32, 40, 48, 56), seed: int = 0
) -> pd.DataFrame:
    """A sweep's rows: exact, four actions at six capacities, and two comparators."""
    random = np.random.default_rng(seed)
    names = [(domain, f"{domain}-{i}") for domain in DOMAINS for i in range(documents)]
    worth = {name: float(np.exp(random.normal(0, 0.5))) for _, name in names}
    rows = []

    def add(action: str, capacity: int, kl: float, nbytes: int, source: str = "run") -> None:
        for domain, name in names:
            tokens = int(random.integers(24, 40))
            mine = kl * worth[name] * float(np.exp(random.normal(0, 0.2)))
            loss = 2.6 + random.normal(0, 0.1)
            gap = 0.9 * mine + float(random.normal(0, 0.25)) * mine
            rows.append(
                {
                    "on_miss": action, "capacity": capacity, "policy": "lru", "pins": "none",
                    "kv_bits": np.nan, "domain": domain, "prompt": name, "seed": 0,
                    "tokens": tokens, "bytes": nbytes, "kl_mean": mine, "ln_ppl_ratio": gap,
                    "nll": loss + gap, "nll_reference": loss, "split": "test", "source": source,
                    "same_top1": float(np.exp(-2.2 * mine)), "hit_rate": 0.5 + capacity / 150,
                }
            )  # fmt: skip

    trunk, expert = 3_400_000, 31_000 * 8
    for capacity in capacities:
        add("load", capacity, 0.0, trunk + capacity * expert, "replay")
        for action, scale in ACTIONS.items():
            extra = EXPERTS * expert // 3 if action == "low_bit" else 0
            kl = scale * np.exp((48 - capacity) / 11)
            add(action, capacity, float(kl), trunk + capacity * expert + extra)
    add("whole_2bit", EXPERTS, 0.21, trunk + EXPERTS * expert * 6 // 10)
    for capacity in (32, 40, 48):
        kl = 0.5 * np.exp((48 - capacity) / 9)
        add("pruned", capacity, float(kl), trunk + capacity * expert)
    return pd.DataFrame(rows)


def judged(actions: tuple[str, ...] = ("low_bit", "drop"), seed: int = 0) -> pd.DataFrame:
    """A comparison's tokens, of several actions."""
    random = np.random.default_rng(seed)
    rows = []
    for action in actions:
        for domain in DOMAINS:
            for number in range(3):
                worth = np.exp(random.normal(0, 0.4))
                for place in range(96):
                    kl = ACTIONS[action] * worth * np.exp(random.normal(0, 1.8))
                    kl *= 1 + place / 60
                    rows.append(
                        {
                            "on_miss": action, "document": f"{domain}-{number}", "domain": domain,
                            "position": 65 + place, "phase": "decode",
                            "kl": 0.0 if random.random() < 0.05 else float(kl),
                            "same_top1": bool(random.random() < np.exp(-kl)),
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def curves(layers: int = 4) -> pd.DataFrame:
    """Miss-ratio curves of some layers and of all together (layer -1)."""
    capacity = np.arange(6, EXPERTS + 1)
    shape = {"lru": 1.0, "best_static": 0.95, "min_forced": 0.62, "min": 0.5}
    parts = []
    for layer in (*range(layers), -1):
        for policy, scale in shape.items():
            steep = 22 - (layer if layer >= 0 else 1.5)
            ratio = scale * np.exp(-capacity / steep) * (1 - capacity / EXPERTS) ** 0.4 + 0.006
            parts.append(
                pd.DataFrame(
                    {
                        "layer": layer, "phase": "decode", "policy": policy,
                        "capacity": capacity, "experts": EXPERTS, "miss_ratio": ratio,
                        "chance": 1 - capacity / EXPERTS,
                    }
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def pin_transfer(seed: int = 0) -> pd.DataFrame:
    """What pins of each domain gain on each."""
    random = np.random.default_rng(seed)
    rows = []
    for train in DOMAINS:
        for test in DOMAINS:
            gain = random.normal(0.031 if train == test else -0.022, 0.011)
            rows.append((train, test, gain, gain - 0.012, gain + 0.012))
    return pd.DataFrame(rows, columns=["train", "test", "gain", "low", "high"])


def prices(count: int = 300, seed: int = 0) -> pd.DataFrame:
    """Prices of forced misses under three actions."""
    random = np.random.default_rng(seed)
    parts = []
    for action, scale in {"drop": 0.3, "substitute": 0.15, "low_bit": 0.003}.items():
        weight = random.beta(1.6, 7, count)
        price = scale * weight**1.3 * np.exp(random.normal(0, 1.2, count))
        price[random.random(count) < 0.03] = 0.0
        parts.append(pd.DataFrame({"action": action, "weight": weight, "price": price}))
    return pd.concat(parts, ignore_index=True)


def policies() -> pd.DataFrame:
    """Miss ratios of policies with intervals and bounds."""
    rows = []
    worse = {"lfru": 0, "lru": 0.012, "lfu": 0.014, "sieve": 0.02, "s3_fifo": 0.03, "static": 0.06}
    for capacity in (16, 32, 48):
        base = 0.62 * np.exp(-capacity / 24)
        rows.append(("min", capacity, 0.5 * base, np.nan, np.nan, False))
        rows.append(("min_forced", capacity, 0.62 * base, np.nan, np.nan, False))
        for name, more in worse.items():
            at = base + more
            rows.append((name, capacity, at, at - 0.009, at + 0.009, more < 0.013))
    return pd.DataFrame(
        rows, columns=["policy", "capacity", "miss_ratio", "low", "high", "best"]
    )  # fmt: skip


def forecasts(seed: int = 0) -> pd.DataFrame:
    """Predicted and measured speeds of two models."""
    random = np.random.default_rng(seed)
    measured = np.exp(random.uniform(1.5, 5, 18))
    return pd.DataFrame(
        {
            "model": ["lab"] * 10 + ["bench"] * 8,
            "measured": measured,
            "predicted": measured * np.exp(random.normal(0.02, 0.1, 18)),
        }
    )


def working_sets() -> pd.DataFrame:
    """Distinct experts by stretch of tokens, by domain."""
    rows = []
    for place, domain in enumerate(DOMAINS):
        for window in (1, 2, 4, 8, 16, 32, 64, 128):
            chance = EXPERTS * (1 - (1 - 6 / EXPERTS) ** window)
            rows.append((domain, window, 6 + (chance - 6) * (0.62 + 0.04 * place), chance))
    return pd.DataFrame(rows, columns=["domain", "n", "distinct", "chance"])


def balances() -> pd.DataFrame:
    """Balance by domain and layer, with chance."""
    rows = [
        (domain, layer, 0.6 + 0.1 * place + 0.05 * layer, 0.35 + 0.02 * layer,
         0.93 - 0.02 * place - 0.015 * layer, 0.11, 0.06, 0.998)
        for place, domain in enumerate(DOMAINS[:4])
        for layer in range(8)
    ]  # fmt: skip
    columns = ["domain", "layer", "cv", "gini", "entropy"]
    chances = [f"{name}_chance" for name in columns[2:]]
    return pd.DataFrame(rows, columns=columns + chances)


def tolerances() -> pd.DataFrame:
    """Smallest capacities by action and tolerance."""
    known = {
        "low_bit": (32, 20, 8), "substitute": (56, 44, 28), "reroute": (np.nan, 46, 30),
        "drop": (np.nan, 52, 40), "wrong_slot": (np.nan, np.nan, np.nan),
    }  # fmt: skip
    rows = [
        (action, tolerance, found)
        for action, each in known.items()
        for tolerance, found in zip((0.01, 0.05, 0.2), each, strict=True)
    ]
    return pd.DataFrame(rows, columns=["on_miss", "tolerance", "capacity"])


def arms(seed: int = 0) -> pd.DataFrame:
    """A comparison's arms: a row a judged token and arm."""
    random = np.random.default_rng(seed)
    rows = []
    for domain in DOMAINS:
        for number in range(4):
            for position in range(65, 97):
                kl = float(0.2 * np.exp(random.normal(0, 1)))
                for arm, share in {"constrained": 1.0, "imposed": 0.7, "own": 0.4}.items():
                    rows.append((f"{domain}-{number}", domain, position, "decode", arm, kl * share))
    return pd.DataFrame(rows, columns=["document", "domain", "position", "phase", "arm", "kl"])


def shares() -> pd.DataFrame:
    """Shares of the damage, by domain and for all; nothing was damaged in one."""
    rows = []
    for place, domain in enumerate((*DOMAINS, "all")):
        for share, mean in {"rerouting": 0.3, "inherited": 0.55}.items():
            mean += 0.03 * place - 0.1
            rows.append((domain, share, mean, mean - 0.12, mean + 0.12))
    rows[0] = ("python", "rerouting", np.nan, np.nan, np.nan)
    return pd.DataFrame(rows, columns=["domain", "share", "mean", "low", "high"])


def agreement() -> pd.DataFrame:
    """Routing agreement with the full model by layer."""
    layers = np.arange(8)
    return pd.DataFrame(
        {
            "layer": layers, "overlap": 0.98 - 0.045 * layers, "same_first": 0.99 - 0.06 * layers,
            "agreement": 0.97 - 0.045 * layers, "low": 0.95 - 0.045 * layers,
            "high": 0.99 - 0.045 * layers, "chance": 6 / EXPERTS,
        }
    )  # fmt: skip


def cliff(broken: bool = True) -> SimpleNamespace:
    """What a cliff study found: with a break at 30, or without any."""
    x = np.arange(12, 61, 6).astype(float)
    smooth = 1.2 * np.exp(-(x - 12) / 16)
    with_break = np.where(x < 30, 0.5 + 0.05 * (30 - x), 0.5 * np.exp(-(x - 30) / 10))
    curve = pd.DataFrame(
        {"capacity": x, "mean": with_break if broken else smooth, "smooth": smooth,
         "broken": with_break}
    )  # fmt: skip
    return SimpleNamespace(
        curve=curve, x="capacity", y="ln_ppl_ratio", breaks=[30.0] if broken else [],
        interval=(27.0, 33.0) if broken else (np.nan, np.nan), level=0.9, documents=24,
        verdict="cliff" if broken else "no cliff",
    )  # fmt: skip
