"""The report as a page to read: for each part what was done, what came out, what was promised.

Every figure comes from the report; where nothing was measured the page says so and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..display import size
from . import sections
from .bandwidth import ReadRate
from .exact import BankCheck
from .wording import ratio, table, worst, yes

if TYPE_CHECKING:
    from .report import CheckReport

MEANING = {
    "exact": "Every layer gave the same bits as stock mlx-lm, in every comparison.",
    "exact in decode and close in prefill": "One token at a time, every layer gave the same bits "
    "as stock mlx-lm. With many tokens at once some bits differ, by no more than stock mlx-lm "
    "differs from itself when a prompt is cut differently, or than rounding explains.",
    "NOT exact": "Something differs from stock mlx-lm by more than it may. Please send the report: "
    "this is what the check is for.",
    "not checked": "No layer could be compared, so this says nothing about exactness.",
}


def page(report: CheckReport) -> str:
    """Returns the report as Markdown."""
    parts = [
        _head(report),
        sections.exactness(report),
        sections.noise(report),
        sections.bandwidth(report),
        sections.memory(report),
        sections.speed(report),
        _machine(report),
        _send(),
        _layers(report),
    ]
    return "\n\n".join(parts) + "\n"


def _head(report: CheckReport) -> str:
    m, f = report.machine, report.model
    lines = [
        f"# moelab check: {f.name}",
        f"**Verdict: {report.verdict}.** {MEANING[report.verdict]}",
        f"Checked on {m.chip} ({m.backend}), {size(m.memory_bytes)} of memory, {m.system}, on "
        f"{m.date[:10]}; it took {report.seconds:.0f} seconds. The model, of the family "
        f"{f.family}, has {f.layers} layers of {f.experts} experts, of which each token uses "
        f"{f.top_k}, and {size(f.total_bytes)} in all.",
        "moelab holds some experts of each layer in memory, in a *bank*, and reads the others from "
        "disk when a token asks for them. This page says whether that changed anything here, and "
        "what it cost. *Prefill* is reading the prompt, many tokens at once; *decode* is writing, "
        "one token at a time.",
        table(["part", "result", "as promised?"], _summary(report)),
    ]
    return "\n\n".join(lines)


def _summary(report: CheckReport) -> list[list[str]]:
    e, memory, speed = report.exactness, report.memory, report.speed
    rows = []
    for kind in ("decode", "prefill"):
        some = [c for c in e.checks if c.kind == kind]
        equal = sum(c.difference.equal for c in some)
        result = f"equal in every bit in {equal} of {len(some)} comparisons"
        if equal < len(some):
            result += f", else {worst(c.difference for c in some)} apart at most"
        rows.append([f"1. bank against stock, {kind}", result, yes(_fine(report, some))])
    floor = worst(n.difference for n in e.noise)
    same = "equal in every bit" if floor == "none" else f"{floor} apart at most"
    rows.append(["2. stock against itself, prefill", same, "–"])
    rows.append(["3. reading experts", _best(report.bandwidth.rates), "–"])
    if memory is None or speed is None:
        return [*rows, ["4. memory", "not run", "–"], ["5. speed", "not run", "–"]]
    kept = memory.kept and memory.work_kept is not False
    rows.append(
        [
            "4. memory",
            f"{size(memory.loading)} instead of {size(memory.full)}; "
            f"{memory.deviation:+.1%} from what was asked for"
            + ("" if memory.work_kept is not False else "; more working memory than stock"),
            yes(kept),
        ]
    )
    beside = ""
    if speed.stock is not None:
        beside = f", {ratio(speed.lab.decode, speed.stock.decode)} of stock's"
    if speed.same_bits is not None:
        rows.append(
            [
                "5. output of the whole model",
                f"{'the same bits' if speed.same_bits else 'not the same bits'} and "
                f"{'the same' if speed.same_tokens else 'other'} tokens as stock",
                # Where prefill may be close, what is written after it cannot be held to the bit.
                yes(speed.same_bits) if speed.same_bits or report.verdict == "NOT exact" else "–",
            ]
        )
    if report.machine.was_busy:
        beside += " (the machine was busy)"
    rows.append(["5. speed", f"{speed.lab.decode.median:.1f} new tokens a second{beside}", "–"])
    return rows


def _fine(report: CheckReport, checks: Sequence[BankCheck]) -> bool | None:
    """Whether comparisons came out as promised on this backend; None if there are none."""
    if not checks:
        return None
    gpu = report.machine.backend != "CPU"
    return all(
        c.difference.equal or (gpu and c.kind == "prefill" and report.exactness.close(c))
        for c in checks
    )


def _best(rates: Sequence[ReadRate]) -> str:
    found = []
    for state in ("cold", "partly cached", "unknown", "warm"):
        some = [rate for rate in rates if rate.state == state]
        if some:
            best = max(some, key=lambda rate: rate.gb_per_second.median)
            name = "page cache unknown" if state == "unknown" else state
            found.append(f"{name} {best.gb_per_second.median:.2f} GB/s")
    return "at best " + ", ".join(found)


def _machine(report: CheckReport) -> str:
    m, f = report.machine, report.model
    rows = [
        ["chip", f"{m.chip}, {m.cores} logical cores"],
        ["busy with other programs at the start", f"{m.busy:.0%}"],
        ["memory", size(m.memory_bytes)],
        ["system", m.system],
        ["MLX computes on", m.backend],
        *([name, value] for name, value in m.versions.items()),
        ["date", m.date],
        ["model", f.name],
        ["fingerprint", f.fingerprint],
        ["family", f.family],
        ["experts", f"{f.layers} layers of {f.experts}, {f.top_k} for each token, {f.precision}"],
        ["one expert", size(f.expert_bytes)],
        ["whole model", f"{size(f.total_bytes)}, of which {size(f.trunk_bytes)} no experts"],
    ]
    return "## 6. The machine and the model\n\n" + table(["what", "which"], rows)


def _send() -> str:
    return (
        "## How to send this back\n\n"
        "Open an issue in moelab's repository and attach `check.json`, the file beside this page. "
        "It holds what this page says, in full, and nothing else: no text, no names of people, "
        "folders or computers. Results from machines like yours are what we have no other way to "
        "get, good ones as well as bad ones."
    )


def _layers(report: CheckReport) -> str:
    e = report.exactness
    rows = []
    for layer in sorted({c.layer for c in e.checks}):
        some = [c for c in e.checks if c.layer == layer]
        rows.append(
            [
                str(layer),
                worst(c.difference for c in some if c.kind == "decode"),
                worst(c.difference for c in some if c.kind == "prefill"),
                worst(n.difference for n in e.noise if n.layer == layer),
                _judged(report, some),
            ]
        )
    return (
        "## Layer by layer\n\n"
        + table(["layer", "decode", "prefill", "stock against itself", "verdict"], rows)
        + "\n\nLargest differences from stock, as shares of the layer's largest output."
    )


def _judged(report: CheckReport, checks: Sequence[BankCheck]) -> str:
    if all(c.difference.equal for c in checks):
        return "equal"
    decode = all(c.difference.equal for c in checks if c.kind == "decode")
    return "close" if decode and all(report.exactness.close(c) for c in checks) else "**NOT exact**"
