"""`moelab.profile`: runs prompts through a model and counts which experts are used."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ProfileError
from .experts.capacity import Capacity
from .experts.profile import PROMPT_TOKENS, Profile
from .experts.tally import Tally, check_lossless
from .prompt_texts import DomainText, Prompts, Windows, digest, texts_of, windows

if TYPE_CHECKING:
    import mlx.core as mx

    from .lab import Lab


def profile(
    model: Lab | str | Path = "lab",
    prompts: Prompts = None,
    *,
    tokens: int = PROMPT_TOKENS,
    decode_tokens: int = 0,
    capacity: Capacity | None = None,
    seed: int = 0,
    progress: bool = True,
    **load_options: Any,
) -> Profile:
    """Counts how often, how strongly and in how many prompts each expert is used.

    Routing is exact at every capacity, so a profile does not depend on it. Prompts have one
    length, since how many experts a prompt uses depends on its length: see
    `moelab.prompt_texts.windows`. Each is run by itself, from an empty cache.

    Args:
        model: A lab, or what `moelab.load` takes; a lab that is made here is closed.
        prompts: A file, texts, or None for the calibration texts that ship with the package; see
            `moelab.prompt_texts.texts_of`.
        tokens: Tokens of a prompt.
        decode_tokens: Tokens to generate after each prompt, as the model recommends to sample.
            End-of-text tokens are not drawn, so that all answers have this length.
        capacity: Experts a layer, as in `moelab.load`; only where `model` is no lab.
        seed: For sampling; the same for every prompt.
        progress: Show a progress bar.
        **load_options: More of `moelab.load`.

    Returns:
        The profile; `Profile.save` writes it.

    Raises:
        ProfileError: If there is no text of that length, or the lab's miss action is lossy.
        CheckpointError: As `moelab.load`.
        CapacityError: As `moelab.load`.
    """
    if isinstance(decode_tokens, bool) or not isinstance(decode_tokens, int) or decode_tokens < 0:
        raise ProfileError(f"decode_tokens is an int from 0 on, got {decode_tokens!r}.")
    texts, called = texts_of(prompts)
    with opened(model, capacity, load_options) as lab:
        # Before anything runs: the manifest of a recording says how misses are treated.
        with lab.record() as empty:
            pass
        check_lossless(empty.run)
        cut = windows(lab.tokenizer, texts, tokens)
        tally = Tally([s.layer for s in lab.sites], [s.experts for s in lab.sites])
        lengths = {"prefill": tokens, **({"decode": decode_tokens} if decode_tokens else {})}
        for domain, ids in shown(cut, progress, "profile"):
            with lab.record() as recording:
                _run(lab, ids, decode_tokens, seed)
            tally.add(recording.routing, recording.tokens, domain, lengths, tokens + decode_tokens)
        return tally.profile(
            model=lab.name,
            fingerprint=lab.fingerprint,
            top_k=[site.top_k for site in lab.sites],
            phase_tokens=lengths,
            prompt_tokens=tokens + decode_tokens,
            provenance={
                **provenance("moelab.profile", lab, texts, called, cut),
                "settings": {
                    "tokens": tokens, "decode_tokens": decode_tokens,
                    **({"seed": seed, "sampling": lab.sampling.as_dict()} if decode_tokens else {}),
                },
            },
        )  # fmt: skip


@contextlib.contextmanager
def opened(
    model: Lab | str | Path, capacity: Capacity | None, load_options: dict[str, Any]
) -> Iterator[Lab]:
    """Gives a lab: the one that was given, or one that is closed afterwards."""
    from .lab import Lab

    if isinstance(model, Lab):
        if capacity is not None or load_options:
            given = [*(["capacity"] if capacity is not None else []), *load_options]
            raise ProfileError(
                f"{', '.join(given)} cannot be set for a lab that is loaded already. Leave it "
                "out, or give the model's name."
            )
        yield model
        return
    from .loading import load

    with load(model, "auto" if capacity is None else capacity, **load_options) as lab:
        yield lab


def shown(cut: Windows, progress: bool, what: str) -> Iterator[tuple[str, list[int]]]:
    """Yields prompts behind a progress bar."""
    from tqdm.auto import tqdm

    bar = tqdm(cut.prompts, desc=what, unit="prompt", disable=not progress, leave=False)
    with contextlib.closing(bar):
        yield from bar


def provenance(
    made_by: str, lab: Lab, texts: Sequence[DomainText], called: str, cut: Windows
) -> dict[str, Any]:
    """Returns what a profile says about how it was made; JSON values."""
    from .machine import backend, versions

    return {
        "made_by": made_by,
        "predicted": False,
        "prompts": called,
        "texts": len(texts),
        "texts_digest": digest(texts),
        "texts_too_short": cut.too_short,
        "model_type": lab.config["model_type"],
        "capacity": lab.capacity if len(set(lab.capacities)) == 1 else lab.capacities,
        "versions": versions(),
        "backend": backend(),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _run(lab: Lab, ids: list[int], decode_tokens: int, seed: int) -> None:
    """Runs one prompt and generates exactly `decode_tokens` tokens after it."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    options: dict[str, Any] = {}
    if decode_tokens:
        options = dataclasses.replace(lab.sampling, seed=seed).options()
        ends = sorted(lab.tokenizer.eos_token_ids)
        options["logits_processors"] = [
            *options.get("logits_processors", ()), _never(ends)
        ]  # fmt: skip
    for _ in generate_step(mx.array(ids), lab.model, max_tokens=decode_tokens, **options):
        pass


def _never(tokens: list[int]) -> Callable[[mx.array, mx.array], mx.array]:
    def processor(_: mx.array, logits: mx.array) -> mx.array:
        if tokens:
            logits[:, tokens] = -float("inf")
        return logits

    return processor
