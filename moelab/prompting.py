"""From what a user says to token ids, and from a model's recommendations to a sampler."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import CheckpointError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | mx.array
"""Text, token ids, or a chat: a list of `{"role": …, "content": …}`."""

Template = bool | str
"""`"auto"`: as a chat turn where the tokenizer has a template. True: always. False: raw text."""


def to_tokens(tokenizer: Any, prompt: Prompt, template: Template = "auto") -> list[int]:
    """Turns a prompt into token ids.

    Args:
        tokenizer: mlx-lm's tokenizer.
        prompt: Text, a chat, or token ids, which are taken as they are.
        template: What to do with text. A chat always needs the template.

    Raises:
        ValueError: If the prompt is empty or of no such kind, or a template is needed and the
            tokenizer has none.
    """
    if template not in (True, False, "auto"):
        raise ValueError(f"template must be True, False or 'auto', got {template!r}.")
    has_template = bool(getattr(tokenizer, "has_chat_template", False))
    if isinstance(prompt, str):
        if template is False or (template == "auto" and not has_template):
            return _not_empty(_encode(tokenizer, prompt))
        prompt = [{"role": "user", "content": prompt}]
    items: Any = prompt.reshape(-1).tolist() if isinstance(prompt, mx.array) else prompt
    if not isinstance(items, Sequence):
        raise ValueError(f"A prompt is text, token ids or a list of messages, got {prompt!r:.80}.")
    ids = [int(item) for item in items if isinstance(item, int)]
    if ids and len(ids) == len(items):
        return ids
    messages = [dict(m) for m in items if isinstance(m, Mapping) and "role" in m]
    if len(messages) != len(items):
        raise ValueError(
            "A prompt that is a list holds token ids or messages with 'role' and 'content', "
            f"got {prompt!r:.80}."
        )
    if messages and not has_template:
        raise ValueError(
            "This tokenizer has no chat template, so it cannot take messages. "
            "Give the text itself, with template=False."
        )
    if not messages:
        return _not_empty([])
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return _not_empty(list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded))


def _encode(tokenizer: Any, text: str) -> list[int]:
    # As mlx_lm.stream_generate does: no second BOS for text that begins with one.
    bos = tokenizer.bos_token
    return list(tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)))


def _not_empty(tokens: list[int]) -> list[int]:
    if not tokens:
        raise ValueError("The prompt is empty: there must be at least one token to go on from.")
    return tokens


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. A temperature of 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # so that NaN is refused too
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}.")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}.")

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings, for a manifest."""
        return asdict(self)

    def options(self) -> dict[str, Any]:
        """Returns `sampler` and `logits_processors` for mlx-lm, and seeds MLX if a seed is set."""
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        sampler: Callable[[mx.array], mx.array] = make_sampler(
            temp=self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k
        )
        options: dict[str, Any] = {"sampler": sampler}
        if self.repetition_penalty != 1.0:
            options["logits_processors"] = make_logits_processors(
                repetition_penalty=self.repetition_penalty
            )
        return options


def recommended_sampling(folder: Path) -> Sampling:
    """Returns the sampling that a model's `generation_config.json` recommends; greedy if none.

    Raises:
        CheckpointError: If it recommends what no sampler takes.
    """
    try:
        config = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        return Sampling()
    if not isinstance(config, dict) or not config.get("do_sample", False):
        return Sampling()
    known: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    given = {k: config[k] for k in known if config.get(k) is not None}
    try:
        return Sampling(**{k: type(v)(given.get(k, v)) for k, v in known.items()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'generation_config.json'} recommends {given}, which no sampler takes "
            f"({error}). Correct the file or remove it."
        ) from error
