"""The one-call API: `generate`, `stream_generate` and `Session`.

The functions keep the lab that they made and use it again when the next call asks for the same
model and settings. Another model or setting closes it first, so a notebook never holds two large
models by accident; `release` frees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ClosedError, NotYetError
from .experts.capacity import Capacity
from .experts.misses import MissAction
from .prompting import Prompt, Template

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from .lab import Lab


_kept: tuple[str, Lab] | None = None
"""The lab that was made last, and what it was asked for by."""


def generate(
    model: str | Path,
    prompt: Prompt,
    max_tokens: int = 200,
    *,
    capacity: Capacity = "auto",
    policy: str = "lru",
    on_miss: str | MissAction = "load",
    pins: Mapping[int, Iterable[int]] | None = None,
    swap_budget: int | None = None,
    profile_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    kv_bits: int | None = None,
    template: Template = "auto",
    dtype: str | None = None,
    **options: Any,
) -> str:
    """Generates text with only part of a model's experts in memory.

    Args:
        model: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub.
        prompt: Text, a list of messages, or token ids.
        max_tokens: Tokens to generate at most.
        capacity: Experts a layer (int), a share of them (float), or `"auto"`.
        policy: Who leaves when an expert needs a slot. This and the next three: see `moelab.load`.
        on_miss: What happens when a chosen expert is not resident; `"load"` is exact.
        pins: Experts that never leave.
        swap_budget: For a lossy `on_miss`: experts a layer that may enter after a step.
        profile_path: Not built yet; raises.
        cache_dir: Not built yet; raises.
        kv_bits: Bits of the key-value cache: 8, 4 or None.
        template: `"auto"` takes text as a chat turn where the tokenizer has a template; False
            takes it as it is.
        dtype: See `moelab.load`.
        **options: Sampling and more; see `Lab.stream`. What the model recommends, unless given.

    Returns:
        The text.
    """
    responses = stream_generate(
        model, prompt, max_tokens, capacity=capacity, policy=policy, on_miss=on_miss, pins=pins,
        swap_budget=swap_budget, profile_path=profile_path, cache_dir=cache_dir, kv_bits=kv_bits,
        template=template, dtype=dtype, **options,
    )  # fmt: skip
    return "".join(response.text for response in responses)


def stream_generate(
    model: str | Path,
    prompt: Prompt,
    max_tokens: int = 200,
    *,
    capacity: Capacity = "auto",
    policy: str = "lru",
    on_miss: str | MissAction = "load",
    pins: Mapping[int, Iterable[int]] | None = None,
    swap_budget: int | None = None,
    profile_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    kv_bits: int | None = None,
    template: Template = "auto",
    dtype: str | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generates text piece by piece. Takes the arguments of `generate`.

    Yields:
        mlx-lm's `GenerationResponse`.
    """
    _refuse_unbuilt(profile_path=profile_path, cache_dir=cache_dir)
    lab = _lab(
        model, capacity=capacity, policy=policy, on_miss=on_miss, pins=pins,
        swap_budget=swap_budget, dtype=dtype,
    )  # fmt: skip
    return lab.stream(prompt, max_tokens, kv_bits=kv_bits, template=template, **options)


def release() -> None:
    """Frees the model that `generate` and `stream_generate` keep. Without one it does nothing."""
    global _kept
    if _kept is not None:
        kept, _kept = _kept, None
        kept[1].close()


class Session:
    """A model and a conversation with it.

    Args:
        model: `"lab"`, a folder, or a name on the Hugging Face hub.
        capacity: Experts a layer (int), a share of them (float), or `"auto"`.
        policy: Who leaves when an expert needs a slot. This and the next three: see `moelab.load`.
        on_miss: What happens when a chosen expert is not resident; `"load"` is exact.
        pins: Experts that never leave.
        swap_budget: For a lossy `on_miss`: experts a layer that may enter after a step.
        system: A system message.
        profile_path: Not built yet; raises.
        cache_dir: Not built yet; raises.
        kv_bits: Bits of the key-value cache: 8, 4 or None.
        dtype: See `moelab.load`.
        **options: Settings of every turn; see `Lab.stream`.

    Attributes:
        lab: The model.
        chat: The conversation.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        capacity: Capacity = "auto",
        policy: str = "lru",
        on_miss: str | MissAction = "load",
        pins: Mapping[int, Iterable[int]] | None = None,
        swap_budget: int | None = None,
        system: str | None = None,
        profile_path: str | Path | None = None,
        cache_dir: str | Path | None = None,
        kv_bits: int | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        from .loading import load

        _refuse_unbuilt(profile_path=profile_path, cache_dir=cache_dir)
        self.lab = load(
            model, capacity, policy=policy, on_miss=on_miss, pins=pins, swap_budget=swap_budget,
            dtype=dtype,
        )  # fmt: skip
        try:
            self.chat = self.lab.chat(system=system, kv_bits=kv_bits, **options)
        except BaseException:
            self.lab.close()
            raise
        self._closed = False

    def stream(
        self, message: str, max_tokens: int = 200, **options: Any
    ) -> Iterator[GenerationResponse]:
        """Takes a turn of the conversation and yields the answer piece by piece."""
        if self._closed:
            raise ClosedError("This session was closed. Make another.")
        return self.chat.stream(message, max_tokens, **options)

    def generate(self, message: str, max_tokens: int = 200, **options: Any) -> str:
        """Takes a turn of the conversation and returns the answer whole."""
        return "".join(r.text for r in self.stream(message, max_tokens, **options))

    @property
    def memory_gb(self) -> float:
        """GB (10⁹ bytes) that MLX holds now: weights, slots and caches, of all models."""
        import mlx.core as mx

        return mx.get_active_memory() / 1e9

    def close(self) -> None:
        """Frees the model. Calling it again does nothing."""
        self._closed = True
        self.lab.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lab(model: str | Path, **settings: Any) -> Lab:
    from .loading import load

    global _kept
    # The repr tells 1 from 1.0, which are different capacities.
    key = repr((str(model), sorted(settings.items())))
    if _kept is not None and _kept[0] != key:
        release()
    if _kept is None:
        _kept = (key, load(model, **settings))
    return _kept[1]


def _refuse_unbuilt(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotYetError(
                f"{name}={value!r}: this option is not built yet. Leave it out: the run then "
                "starts with an empty bank and keeps the most recently used experts."
            )
