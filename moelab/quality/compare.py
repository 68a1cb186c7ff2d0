"""`moelab.compare`: how much quality a capacity and a miss action cost, against the full model.

Without a reference the full model is the same lab with `on_miss="load"`, whose logits are stock
mlx-lm's at every capacity, so it works where the full model does not fit. Each window is run by the
full model first, then by the constrained one from the same exactly run prefix, token by token; the
bank is reset to its initial contents before each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ..display import size
from ..errors import StudyError
from ..experts.capacity import Capacity
from ..experts.misses import MissAction, resolve_action
from ..lab import Lab
from ..profiling import opened
from ..prompt_texts import Prompts
from ..routing.session import manifest
from .arms import agreement, run_arms
from .comparison import Comparison
from .intervals import clustered
from .judge import Reference, Stock, as_before, judged, put_action
from .window import Document, Window, documents_of, few_of_each, windows_of

if TYPE_CHECKING:
    import pandas as pd

PREFIX = 48
"""Tokens that run exactly before anything is judged."""

TOKENS = 40
"""Judged tokens a text."""

EACH = 4
"""Shipped texts a domain, where no texts are given."""

CHUNK = 16
"""Tokens a forward pass of the chunk-wise mode."""

Mode = Literal["token", "chunk"]
"""One token a step after the prefix, as in decoding; or several, as in prefill."""


def compare(
    lab: Lab | str | Path,
    texts: Prompts | Sequence[Window] = None,
    reference: Lab | tuple[Any, Any] | None = None,
    *,
    prefix: int = PREFIX,
    tokens: int | None = TOKENS,
    on_miss: str | MissAction | None = None,
    swap_budget: int | Literal["keep"] | None = "keep",
    mode: Mode = "token",
    chunk: int | None = None,
    kv_bits: int | None = None,
    arms: bool = False,
    level: float = 0.95,
    capacity: Capacity | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Comparison:
    """Judges a lab against the full model on texts, with paired intervals over documents.

    Of each text the first `prefix` tokens run exactly; the token after them is fed, and each
    prediction from there on is judged. Before each text and each run the bank is reset to its
    declared initial contents, so the order of texts does not matter. Afterwards the lab has the
    action and swap budget that it had, and its bank its initial contents.

    Args:
        lab: The model; or what `moelab.load` takes, which is closed afterwards.
        texts: Texts, mappings with `text`, `domain` and `id`, or a file; see
            `moelab.prompt_texts.texts_of`. None takes four of each domain of the shipped test
            split, of as many works as there are. Intervals are over texts as if they were drawn
            independently: of excerpts of one work, take one.
        reference: None for the lab itself with every expert computed. Another lab, which runs
            exactly whatever its own action is; or a model and tokenizer that `mlx_lm.load` gave.
        prefix: Tokens of each text that run exactly.
        tokens: Judged tokens of each text. None judges each to its end, at most 256, so that long
            texts do not decide everything.
        on_miss: What happens on a miss; None for the lab's own action.
        swap_budget: Experts a layer that may enter after a step: None for the layer's top-k,
            "keep" for the lab's own.
        mode: "token" feeds one token at a time, as in decoding. "chunk" feeds several, as in
            prefill: one step a chunk, so that many tokens meet the same bank. Both runs have the
            same passes.
        chunk: Tokens a chunk, for mode "chunk"; None for 16.
        kv_bits: Bits of the constrained run's key-value cache after the prefix: 8, 4 or None.
        arms: Also run the arms that say why; see `moelab.quality.arms`. Takes twice as long.
        level: Of the intervals.
        capacity: As in `moelab.load`; only where `lab` is no lab.
        progress: Show a progress bar.
        **load_options: More of `moelab.load`.

    Returns:
        A `Comparison`. `.summary` has a row a domain, then one for `domain="all"`.

    Raises:
        StudyError: If there is no text or one is too short for its window (named), the reference
            has another tokenizer, a logit is NaN or infinite (document, position and run are
            named), or an argument is out of range.
        MissActionError: If the action cannot be had for this model.
        MoelabError: While the lab is being recorded.
    """
    passes = _chunk(mode, chunk)
    _check(level, arms, reference, kv_bits)
    with opened(lab, capacity, load_options) as model:
        full: Lab | Stock = model
        if reference is not None and reference is not model:
            full = reference if isinstance(reference, Lab) else Stock(*reference)
        windows, called = _windows(model, texts, prefix, tokens)
        if full is not model:
            check_tokenizers(model, full, windows)
        action = resolve_action(model.miss_action if on_miss is None else on_miss)
        budget = model.swap_budget if swap_budget == "keep" else swap_budget
        found = _Found()
        with as_before(model):
            # For the whole comparison, so that copies at few bits are made once.
            put_action(model, action, budget)
            settings = {
                **_settings(model, full, passes, kv_bits, windows, called),
                "arms": arms, "level": level,
            }  # fmt: skip
            same = full is model or (
                isinstance(full, Lab) and full.fingerprint == model.fingerprint
            )
            for window in _shown(windows, progress):
                held = Reference(full, window, chunk=passes, record=same, arms=arms)
                frame, routing = judged(
                    model, window, held, action, swap_budget=budget, kv_bits=kv_bits, record=same
                )
                found.add(window, frame, held.routing, routing)
                if arms:
                    found.arms.append(
                        run_arms(model, window, held, action, swap_budget=budget, constrained=frame)
                    )
        return found.comparison(model, settings, level)


def noise_floor(
    lab: Lab,
    texts: Prompts | Sequence[Window] = None,
    *,
    capacity: Capacity | None = None,
    prefix: int = PREFIX,
    tokens: int | None = TOKENS,
    mode: Mode = "token",
    chunk: int | None = None,
    level: float = 0.95,
    progress: bool = True,
) -> Comparison:
    """Judges the exact lab at one capacity against the exact lab at another.

    What is left is the noise that no comparison can go under: exactly zero where kernels give the
    same bits for every bank size, as on a CPU. The lab is resized and then sized back; its bank has
    its initial contents afterwards.

    Args:
        lab: The model; its own capacity is the reference.
        texts: As in `compare`.
        capacity: The other capacity; None for the smallest that there may be, or half of the
            experts where the lab has that.
        prefix: As in `compare`.
        tokens: As in `compare`.
        mode: As in `compare`.
        chunk: As in `compare`.
        level: As in `compare`.
        progress: Show a progress bar.

    Returns:
        A `Comparison`, whose settings have the reference's capacity as `reference_capacity`.

    Raises:
        StudyError: As `compare`; or if the other capacity is the lab's own.
        CapacityError: If it is none of this model.
        MoelabError: While the lab is being recorded.
    """
    passes = _chunk(mode, chunk)
    _check(level, False, None, None)
    windows, called = _windows(lab, texts, prefix, tokens)
    own, budget = list(lab.capacities), lab.budget
    other = _other_capacity(lab) if capacity is None else capacity
    found = _Found()
    with as_before(lab):
        put_action(lab, "load", None)
        # All full runs first, since resizing reads experts; their logits wait in files.
        held = [
            Reference(lab, window, chunk=passes, record=True, kept_bytes=0)
            for window in _shown(windows, progress, "the reference")
        ]
        try:
            lab.resize(other)
            if lab.capacities == own:
                raise StudyError(
                    f"The lab has {own[0]} experts a layer already: the noise floor needs two "
                    "capacities. Give another one."
                )
            settings = _settings(lab, lab, passes, None, windows, called)
            settings |= {"arms": False, "level": level, "reference_capacity": _one(own)}
            settings["reference"] = f"the same, exact with {_one(own)} experts a layer"
            for window, reference in zip(_shown(windows, progress), held, strict=True):
                frame, routing = judged(lab, window, reference, "load", record=True)
                found.add(window, frame, reference.routing, routing)
        finally:
            lab.resize(own)
            lab.budget = budget
    return found.comparison(lab, settings, level)


class _Found:
    """What the windows gave."""

    def __init__(self) -> None:
        self.tokens: list[pd.DataFrame] = []
        self.arms: list[pd.DataFrame] = []
        self.agreement: list[pd.DataFrame] = []

    def add(
        self,
        window: Window,
        frame: pd.DataFrame,
        full: pd.DataFrame | None,
        constrained: pd.DataFrame | None,
    ) -> None:
        self.tokens.append(frame)
        if full is None or constrained is None:
            return
        shared = agreement(full, constrained)
        # A document's mean and number of tokens say all that an interval over documents needs.
        by_layer = shared.groupby("layer", sort=True).agg(
            agreement=("agreement", "mean"), top_k=("top_k", "mean"), tokens=("agreement", "size")
        )
        self.agreement.append(
            by_layer.reset_index().assign(document=window.document, domain=window.domain)
        )

    def comparison(self, lab: Lab, settings: dict[str, Any], level: float) -> Comparison:
        import pandas as pd

        return Comparison(
            tokens=pd.concat(self.tokens, ignore_index=True),
            settings=settings,
            routing_agreement=self._by_layer(lab, level),
            arms=pd.concat(self.arms, ignore_index=True) if self.arms else None,
            level=level,
        )

    def _by_layer(self, lab: Lab, level: float) -> pd.DataFrame | None:
        import pandas as pd

        if not self.agreement:
            return None
        rows = pd.concat(self.agreement, ignore_index=True)
        mean = clustered(
            rows, "agreement", "layer", weights="tokens", level=level, limits=(0.0, 1.0)
        )
        experts = {site.layer: site.experts for site in lab.sites}
        top_k = (rows["top_k"] * rows["tokens"]).groupby(rows["layer"]).sum()
        top_k = top_k / rows.groupby("layer")["tokens"].sum()
        layers = mean["layer"]
        chance = [top_k[layer] / experts[layer] for layer in layers]
        frame = mean.rename(columns={"mean": "agreement"}).assign(chance=chance)
        columns = ["layer", "agreement", "low", "high", "se", "chance", "tokens", "documents"]
        return frame[columns].astype({"tokens": np.int64})


def check_tokenizers(lab: Lab, other: Lab | Stock, windows: Sequence[Window]) -> None:
    """Refuses a reference that would read the texts as other tokens.

    Raises:
        StudyError: If vocabularies differ; names a token.
    """
    if isinstance(other, Lab) and other.fingerprint == lab.fingerprint:
        return
    ours, theirs = lab.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    raise StudyError(
        f"The two models have different tokenizers ({len(ours)} and {len(theirs)} tokens; "
        f"{token!r} is {ours.get(token)} in one and {theirs.get(token)} in the other), so their "
        "predictions are not of the same tokens. Take a reference with the lab's tokenizer."
    )


def _windows(
    lab: Lab, texts: Prompts | Sequence[Window], prefix: int, tokens: int | None
) -> tuple[list[Window], str]:
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, Window) for t in texts):
        windows: list[Any] = list(texts)
        lengths = {window.prefix for window in windows}
        if lengths != {prefix}:
            raise StudyError(
                f"The windows have prefixes of {sorted(lengths)} tokens, and prefix is {prefix}. "
                f"Pass prefix={min(lengths)}, and windows of one prefix."
            )
        return windows, "windows given in memory"
    documents, called = documents_of(cast(Prompts, texts))
    if texts is None:
        least = prefix + (1 if tokens is None else tokens) + 1 if _whole(prefix, tokens) else 1
        documents = few_of_each(lab.tokenizer, documents, least=least, each=EACH)
    return windows_of(lab.tokenizer, documents, prefix=prefix, tokens=tokens), called


def _whole(prefix: Any, tokens: Any) -> bool:
    """Whether these are numbers; `windows_of` refuses others with a reason."""
    return isinstance(prefix, int) and (tokens is None or isinstance(tokens, int))


def _chunk(mode: str, chunk: int | None) -> int | None:
    if mode not in ("token", "chunk"):
        raise StudyError(
            f"mode is 'token' (one at a time, as in decoding) or 'chunk', got {mode!r}."
        )
    if mode == "token" and chunk is not None:
        raise StudyError(
            f"chunk={chunk!r} is for mode='chunk'; mode='token' feeds one token at a time."
        )
    return None if mode == "token" else (CHUNK if chunk is None else chunk)


def _check(level: float, arms: bool, reference: Any, kv_bits: int | None) -> None:
    if not 0 < level < 1:
        raise StudyError(f"level is a share between 0 and 1, such as 0.95, got {level!r}.")
    if arms and reference is not None:
        raise StudyError(
            "Arms impose what the full run of the same lab saw: leave reference out, or arms."
        )
    if arms and kv_bits is not None:
        raise StudyError(
            "Arms split the damage of misses, and kv_bits adds another: leave one of them out."
        )
    pair = isinstance(reference, tuple) and len(reference) == 2
    if reference is not None and not isinstance(reference, Lab) and not pair:
        raise StudyError(
            "reference is a Lab, or the model and tokenizer that mlx_lm.load gives, got "
            f"{type(reference).__name__}."
        )


def _settings(
    lab: Lab,
    full: Lab | Stock,
    chunk: int | None,
    kv_bits: int | None,
    windows: Sequence[Window],
    called: str,
) -> dict[str, Any]:
    """Returns what a reader needs to run it again; the lab has the action in place."""
    said = manifest(lab)
    for name in ("generations", "problems"):
        del said[name]
    counts: dict[str, int] = {}
    for window in windows:
        counts[window.domain] = counts.get(window.domain, 0) + 1
    if full is lab:
        reference = "the same, with every expert computed"
    elif isinstance(full, Lab):
        reference = f"{full.name}, exact with {_one(full.capacities)} experts a layer"
        said["reference_fingerprint"] = full.fingerprint
    else:
        reference = "a model of mlx-lm, all in memory"
    return {
        **said,
        "reference": reference,
        "mode": "token" if chunk is None else "chunk",
        "chunk": chunk,
        "prefix": windows[0].prefix,
        "judged": [window.judged for window in windows],
        "kv_bits": kv_bits,
        "texts": called,
        "documents": counts,
        "bytes": lab.memory().total,
        "memory": size(lab.memory().total),
    }


def _other_capacity(lab: Lab) -> list[int]:
    least = [
        min(site.experts, site.top_k + len(lab.pins.get(site.layer, ()))) for site in lab.sites
    ]
    if least != list(lab.capacities):
        return least
    return [max(low, site.experts // 2) for low, site in zip(least, lab.sites, strict=True)]


def _one(capacities: Sequence[int]) -> int | list[int]:
    return capacities[0] if len(set(capacities)) == 1 else list(capacities)


def _shown(windows: Sequence[Window], progress: bool, what: str = "compare") -> Iterator[Window]:
    from tqdm.auto import tqdm

    bar = tqdm(windows, desc=what, unit="text", disable=not progress, leave=False)
    with contextlib.closing(bar):
        yield from bar


__all__ = [
    "Comparison", "Document", "Window", "check_tokenizers", "compare", "documents_of",
    "noise_floor", "windows_of",
]  # fmt: skip
