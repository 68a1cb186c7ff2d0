"""`Chat`: a conversation that keeps its key-value cache from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .prompting import to_tokens

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from .lab import Lab


class Chat:
    """A conversation with a lab's model, made by `Lab.chat`.

    A turn prefills only what the cache does not hold yet. Where the text of the conversation no
    longer begins with what the cache holds (the template rewrote an earlier turn, or a turn was
    interrupted), the cache is made anew and the conversation prefilled whole: many models keep
    recurrent state, which cannot be taken back.

    Args:
        lab: The lab.
        system: A system message.
        **options: Settings of every turn; see `Lab.stream`.

    Attributes:
        messages: The conversation so far, as `{"role": …, "content": …}`. Change it between turns
            as you like.
    """

    def __init__(self, lab: Lab, *, system: str | None = None, **options: Any) -> None:
        if not getattr(lab.tokenizer, "has_chat_template", False):
            raise ValueError(
                f"{lab.name} has no chat template, so it cannot hold a conversation. "
                "Use lab.generate(text, template=False)."
            )
        self._lab = lab
        self._options = options
        self._cache: list[Any] | None = None
        self._held: list[int] = []
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def stream(
        self, message: str, max_tokens: int = 200, **options: Any
    ) -> Iterator[GenerationResponse]:
        """Takes a turn: adds the message, yields the answer piece by piece, and keeps it.

        Args:
            message: What the user says.
            max_tokens: Tokens of the answer at most.
            **options: See `Lab.stream`; they go before the conversation's own.

        Yields:
            mlx-lm's `GenerationResponse`.
        """
        from mlx_lm.models.cache import make_prompt_cache

        turn = [*self.messages, {"role": "user", "content": message}]
        tokens = to_tokens(self._lab.tokenizer, turn, True)
        cache, held = self._cache, self._held
        if cache is None or len(held) >= len(tokens) or tokens[: len(held)] != held:
            cache, held = make_prompt_cache(self._lab.model), []
        # Until the turn is over the cache is in between: an interrupt leaves none.
        self._cache, self._held = None, []
        pieces: list[str] = []
        generated: list[int] = []
        responses = self._lab.stream(
            tokens[len(held) :], max_tokens, prompt_cache=cache, **{**self._options, **options}
        )
        for response in responses:
            pieces.append(response.text)
            generated.append(response.token)
            if response.finish_reason is not None:
                # Kept before the last piece is handed out: a caller may stop listening there.
                # mlx-lm runs one token ahead, so the answer's last token is in the cache as well.
                self.messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]
                self._cache, self._held = cache, [*tokens, *generated]
            yield response

    def say(self, message: str, max_tokens: int = 200, **options: Any) -> str:
        """Takes a turn and returns the answer whole. See `stream`."""
        return "".join(r.text for r in self.stream(message, max_tokens, **options))

    def __repr__(self) -> str:
        lines = [f"  {m['role']}: {m['content'][:70]!r}" for m in self.messages[-6:]]
        return "\n".join([f"Chat with {self._lab.name}, {len(self.messages)} messages", *lines])
