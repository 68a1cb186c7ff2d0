"""The parts of the page that report measurements: what was done, what came out, what it means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ..display import size
from .bandwidth import ReadRate
from .exact import BankCheck
from .wording import listed, percent, ratio, slots, spread, table, worst

if TYPE_CHECKING:
    from .report import CheckReport


def exactness(report: CheckReport) -> str:
    """Part 1: the bank against the stock layers."""
    e = report.exactness
    rows = []

    def key(check: BankCheck) -> tuple[int, str, int]:
        return check.capacity, check.kind, check.tokens

    for (capacity, kind, tokens), group in groupby(sorted(e.checks, key=key), key=key):
        some = list(group)
        layers = {c.layer for c in some}
        wrong = {c.layer for c in some if not c.difference.equal}
        rows.append(
            [
                str(capacity),
                "decode, 1 token" if kind == "decode" else f"prefill, {tokens} tokens",
                f"{len(layers) - len(wrong)} of {len(layers)} layers",
                worst(c.difference for c in some),
                f"{sum(c.evictions for c in some):,}",
                f"{sum(c.swept for c in some)}" if kind == "prefill" else "–",
            ]
        )
    skipped = ""
    if e.skipped:
        skipped = (
            f" Not compared, since a token needs all of their experts: layers {listed(e.skipped)}."
        )
    head = ["experts in the bank", "input", "the same bits in", "largest difference"]
    return "\n\n".join(
        [
            "## 1. Does the bank compute what the model computes?",
            "For each layer in turn, all of its experts were loaded and run by stock mlx-lm, and a "
            "bank of fewer experts was given the same input: seeded random activations "
            f"({e.dtype}) and choices of experts; the longer inputs use every expert. Meanwhile "
            "the bank had to read experts and evict others, and where an input needs more experts "
            f"than the bank holds, to *sweep*: to serve them in turns.{skipped}",
            table([*head, "evictions", "layers swept"], rows),
            _found(report),
            "Differences are shares of the layer's largest output. A wrong expert would show as "
            "about 100%.",
        ]
    )


def _found(report: CheckReport) -> str:
    verdict = report.verdict
    if verdict == "not checked":
        return "**Nothing could be compared:** no bank was smaller than its layer."
    if verdict == "NOT exact":
        return f"**Not as promised.** {_what_failed(report)}"
    close = verdict != "exact"
    why = "MLX chooses how to compute by the number of experts it is given, and a bank has fewer."
    if report.machine.backend == "CPU":
        if close:
            return (
                "**Not as promised: on a CPU every bit should be equal.** Prefill differs by no "
                f"more than stock from itself (part 2), or than rounding. {why}"
            )
        return "**As promised: equal in every bit.**"
    found = (
        "**As promised for a GPU: decode is equal in every bit; prefill is as close as stock is to "
        f"itself (part 2), or as rounding.** {why}"
        if close
        else "**More than is promised for a GPU, where prefill may be only close: all is equal in "
        "every bit.**"
    )
    return (
        f"{found} For a GPU this promise was made without one to try it on, so what you see here "
        "is evidence that we do not have."
    )


def _what_failed(report: CheckReport) -> str:
    e = report.exactness
    bad = [c for c in e.checks if not (e.close(c) if c.kind == "prefill" else c.difference.equal)]
    if not bad:
        return "The layers agree and the whole model does not (part 5)."
    layers = sorted({c.layer for c in bad})
    kinds = " and ".join(sorted({c.kind for c in bad}))
    rounding = all(e.close(c) for c in bad)
    size = (
        "The differences are as small as stock's own (part 2) or as rounding, so this looks like "
        "another order of adding, not like wrong experts; but decode was expected to be equal."
        if rounding
        else "The differences are larger than rounding explains: wrong results."
    )
    return f"In {kinds}, layers {listed(layers)}. {size}"


def noise(report: CheckReport) -> str:
    """Part 2: stock against itself."""
    e = report.exactness
    rows = []
    names = list(dict.fromkeys(n.variant for n in e.noise))
    for name in names:
        some = [n for n in e.noise if n.variant == name]
        equal = sum(n.difference.equal for n in some)
        rows.append([name, f"{equal} of {len(some)} layers", worst(n.difference for n in some)])
    if all(n.difference.equal for n in e.noise):
        found = (
            "Here stock gives the same bits in whichever company a token is computed, so a "
            "difference in part 1 would be the bank's."
        )
    else:
        found = (
            "Stock differs from itself by this much, so a difference in part 1 that is no larger "
            "says nothing against the bank."
        )
    return "\n\n".join(
        [
            "## 2. How much does stock differ from itself?",
            "Stock mlx-lm computed the longest input of part 1 as a whole, and the same tokens "
            "again in other company. No bank takes part.",
            table(["computed again", "the same bits in", "largest difference"], rows),
            found,
        ]
    )


def bandwidth(report: CheckReport) -> str:
    """Part 3: reading experts."""
    b = report.bandwidth
    rows = [
        [str(rate.threads), rate.state, percent(rate.cached), spread(rate.gb_per_second, 2)]
        for rate in b.rates
    ]
    cold = [rate for rate in b.rates if rate.wanted == "cold"]
    one = b.rates[0]
    token = b.token_warm_ms
    return "\n\n".join(
        [
            "## 3. How fast do experts come from disk?",
            f"An expert of this model is {size(b.expert_bytes)} in {b.pieces} pieces. "
            f"{one.experts} experts ({size(one.nbytes)}), chosen at random, were read straight "
            f"into the memory that MLX computes from, {one.gb_per_second.count} times each way.",
            table(["threads", "page cache", "held before", "GB/s (lowest–highest)"], rows),
            _cache_note(cold),
            f"Copying the same bytes within memory, without a disk, ran at "
            f"{spread(b.copy_gb_per_second, 1)} GB/s.",
            f"**One miss** (one expert, by moelab's own loader) took {spread(b.miss_warm_ms, 3)} "
            "ms with the page cache warm, and "
            + (
                f"{spread(b.miss_cold_ms, 3)} ms with it cold."
                if b.miss_cold_ms is not None
                else "was not measured cold, since the page cache could not be emptied or asked."
            )
            + f" All {report.model.top_k} experts of a token in one layer: "
            f"{spread(token, 3)} ms warm.",
            f"{_busy(report)}No speed is promised: these figures say what this machine allows.",
        ]
    )


def _cache_note(cold: Sequence[ReadRate]) -> str:
    states = {rate.state for rate in cold}
    if states == {"cold"}:
        return (
            "The page cache (memory in which the system keeps files that it read) was emptied of "
            "these experts before each cold reading, and asked: its state is known."
        )
    if "unknown" in states:
        return (
            "Whether the page cache held these experts already could not be found out on this "
            "system, so the readings may be of memory, not of the disk."
        )
    return (
        "The page cache could not be emptied of these experts. “Held before” says how much of them "
        "it held, so readings that are not “cold” are partly of memory."
    )


def _busy(report: CheckReport) -> str:
    """A warning where other programs had a good part of the processor; else nothing."""
    if not report.machine.was_busy:
        return ""
    return (
        f"**Other programs used {report.machine.busy:.0%} of the processor when the check began, "
        "so it is faster than these figures say, and ratios to stock are uncertain.** "
    )


def memory(report: CheckReport) -> str:
    """Part 4: bytes against the promise."""
    title = "## 4. Does it take the memory that was asked for?"
    m, s, machine = report.memory, report.speed, report.machine
    if m is None or s is None:
        return f"{title}\n\nNot run: {report.not_run}"
    rows = [
        ["the whole model would take", size(m.full)],
        ["asked for: everything but the experts", size(m.trunk)],
        [
            f"asked for: {slots(s.capacity)} experts a layer",
            size(m.promised - m.trunk),
        ],
        ["asked for in all", size(m.promised)],
        ["**taken by loading the model**", f"**{size(m.loading)}**"],
        ["taken on top while reading and writing text, at most", size(m.work)],
        [
            "the same of stock mlx-lm",
            "not run" if m.stock_work is None else size(m.stock_work),
        ],
        ["this machine's memory", size(machine.memory_bytes)],
        ["of it available when the check began", size(machine.available_bytes)],
        [
            "Metal's recommended working set",
            "no Metal here"
            if machine.working_set_bytes is None
            else size(machine.working_set_bytes),
        ],
    ]
    verdict = (
        f"**{'As promised' if m.kept else 'Not as promised'}:** loading took "
        f"{size(m.loading)}, {m.deviation:+.1%} from what was asked for; 3% either way is promised."
    )
    if m.work_kept is not None and m.stock_work is not None:
        verdict += (
            f" **{'As promised' if m.work_kept else 'Not as promised'}:** working took "
            f"{size(m.work)} on top, and stock {size(m.stock_work)} for the same "
            "prompt; no more than stock's and 3% of what was asked for is promised."
        )
    return "\n\n".join(
        [
            title,
            "The model was loaded with a bank, and MLX was asked what it holds. The page cache is "
            "not in these figures: the system fills what is free with it, and gives it back.",
            table(["what", "bytes"], rows),
            verdict,
        ]
    )


def speed(report: CheckReport) -> str:
    """Part 5: tokens a second, hits, and the output of the whole model."""
    title = "## 5. How fast is it?"
    s = report.speed
    if s is None:
        return f"{title}\n\nNot run: {report.not_run}"
    rows = [["moelab", spread(s.lab.prefill, 1), spread(s.lab.decode, 1)]]
    if s.stock is None:
        stock = f"Stock mlx-lm was not run: {s.stock_not_run}."
    else:
        rows.append(["stock mlx-lm", spread(s.stock.prefill, 1), spread(s.stock.decode, 1)])
        rows.append(
            [
                "moelab ÷ stock",
                ratio(s.lab.prefill, s.stock.prefill),
                ratio(s.lab.decode, s.stock.decode),
            ]
        )
        stock = (
            "Both wrote the same tokens, and gave every token of the vocabulary a probability of "
            "the same bits at every step."
            if s.same_bits
            else f"Both wrote {'the same' if s.same_tokens else 'different'} tokens, and the "
            "probabilities differ in some bits"
            + (
                ", as they will where prefill is close and not equal."
                if report.verdict == "exact in decode and close in prefill"
                else ", which they must not."
            )
        )
    rounds = s.lab.decode.count
    held = (
        "Whether the page cache held the experts is not known."
        if s.cached is None
        else f"The page cache held {s.cached:.0%} of the experts on disk (of a sample), so that "
        "much of what was missing came from memory and not from the disk itself."
    )
    return "\n\n".join(
        [
            title,
            f"The model ran with {slots(s.capacity)} of {report.model.experts} experts a layer "
            f"({s.chosen}). It read a prompt of {s.prompt_tokens} tokens and wrote {s.tokens}, "
            f"{'once' if rounds == 1 else f'{rounds} times'}, each time from an empty bank"
            f"{'' if s.stock is None else ', in turn with stock mlx-lm'}. {held}",
            table(["", "prompt tokens/s", "new tokens/s"], rows)
            + "\n\nMedian (lowest–highest). The prompt counts until the first new token is there.",
            stock,
            f"While writing, {s.hit_decode:.1%} of the experts that tokens chose were in the bank "
            f"already; while reading the prompt, which found the bank empty, {s.hit_prefill:.1%}. "
            f"Each new token needed {s.loads_per_token:.1f} experts from disk, over all layers, "
            f"and waiting for them took {s.read_share:.0%} of the time.",
            f"{_busy(report)}No speed is promised, only the output.",
        ]
    )
