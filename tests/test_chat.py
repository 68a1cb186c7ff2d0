"""Conversations: one cache from turn to turn, and made anew where the text calls for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import moelab
from moelab.lab import Lab
from tests.support import stock

TURNS = ("the router", "sends each token", "to a few experts")


@pytest.fixture(params=["qwen3_next", "qwen2_moe", "gpt_oss"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with moelab.load(stock.folder(request.param, chat_template=True), 4) as made:
        yield made


def prefilled(chat: Any, message: str, max_tokens: int = 5) -> tuple[str, int]:
    """Takes a turn; the answer, and how many tokens of the prompt were run."""
    responses = list(chat.stream(message, max_tokens))
    return "".join(r.text for r in responses), responses[-1].prompt_tokens


def template(lab: Lab, messages: list[dict[str, str]]) -> list[int]:
    return list(lab.tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def test_turns_equal_stock_with_the_same_cache(lab: Lab) -> None:
    """Against stock mlx-lm, given one cache and the same pieces of the conversation."""
    model, tokenizer = stock.stock(lab.path)
    cache, messages, done = make_prompt_cache(model), list[dict[str, str]](), list[int]()
    chat = lab.chat(temperature=0.0)
    pieces = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        tokens = template(lab, messages)
        if tokens[: len(done)] != done:
            cache, done = make_prompt_cache(model), []
        new = tokens[len(done) :]
        pieces.append(len(new) < len(tokens))
        theirs = list(
            mlx_lm.stream_generate(model, tokenizer, new, max_tokens=5, prompt_cache=cache)
        )
        ours = list(chat.stream(turn, 5))
        assert stock.same_steps(stock.steps(ours), stock.steps(theirs))
        messages.append({"role": "assistant", "content": "".join(r.text for r in theirs)})
        done = tokens + [r.token for r in theirs]
        assert chat.messages == messages


def reusing(lab: Lab) -> tuple[Any, int, list[int]]:
    """A chat after a turn whose answer gives its tokens back; the turn's seed and tokens.

    Most answers of a random model are pieces of characters, whose text is another token.
    """
    for seed in range(60):
        chat = lab.chat(temperature=0.0)
        prompt = template(lab, [{"role": "user", "content": "hi"}])
        (response,) = chat.stream("hi", 1, temperature=1.0, seed=seed)
        held = [*prompt, response.token]
        whole = template(lab, [*chat.messages, {"role": "user", "content": "and"}])
        if whole[: len(held)] == held:
            return chat, seed, held
    pytest.fail("no answer of 60 gave its own tokens back")


def test_only_what_is_new_is_prefilled(lab: Lab) -> None:
    """The cache holds the question and all of the answer; going on from it equals stock."""
    chat, seed, held = reusing(lab)
    ours = list(chat.stream("and", 5))
    whole = template(lab, [*chat.messages[:2], {"role": "user", "content": "and"}])
    assert ours[-1].prompt_tokens == len(whole) - len(held)
    model, tokenizer = stock.stock(lab.path)
    cache = make_prompt_cache(model)
    mx.random.seed(seed)
    (first,) = mlx_lm.stream_generate(
        model, tokenizer, held[:-1], max_tokens=1, prompt_cache=cache, sampler=make_sampler(1.0)
    )
    assert first.token == held[-1]
    theirs = mlx_lm.stream_generate(
        model, tokenizer, whole[len(held) :], max_tokens=5, prompt_cache=cache
    )
    assert stock.same_steps(stock.steps(ours), stock.steps(theirs))


def test_a_changed_conversation_is_prefilled_whole(lab: Lab) -> None:
    chat = lab.chat("be brief", temperature=0.0)
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    for turn in TURNS:
        chat.say(turn, 5)
    assert [m["role"] for m in chat.messages] == ["system"] + 3 * ["user", "assistant"]
    chat.messages = chat.messages[:3]
    chat.messages[1]["content"] = "another question"
    answer, tokens = prefilled(chat, TURNS[1])
    want = [*chat.messages[:3], {"role": "user", "content": TURNS[1]}]
    assert tokens == len(template(lab, want))
    assert answer == lab.generate(want, 5, temperature=0.0)


def test_a_turn_that_was_given_up_never_was(lab: Lab) -> None:
    chat, _, _ = reusing(lab)
    before = list(chat.messages)
    running: Any = chat.stream("never mind", 5)
    next(running)
    running.close()
    assert chat.messages == before
    answer, tokens = prefilled(chat, TURNS[1])
    whole = template(lab, [*before, {"role": "user", "content": TURNS[1]}])
    assert tokens == len(whole), "a cache in between is not gone on from"
    assert answer == lab.generate(whole, 5, temperature=0.0)


def test_a_listener_may_stop_at_the_last_piece(lab: Lab) -> None:
    """`finish_reason` says that the turn is over, so it is."""
    calm, chat = lab.chat(temperature=0.0), lab.chat(temperature=0.0)
    calm.say(TURNS[0], 5)
    for response in chat.stream(TURNS[0], 5):
        if response.finish_reason:
            break
    assert chat.messages == calm.messages
    assert chat.say(TURNS[1], 5) == calm.say(TURNS[1], 5)


def test_a_bad_setting_costs_no_turn(lab: Lab) -> None:
    chat = lab.chat(temperature=0.0)
    chat.say(TURNS[0], 5)
    before = list(chat.messages)
    with pytest.raises(ValueError, match="kv_bits"):
        chat.say(TURNS[1], 5, kv_bits=7)
    assert chat.messages == before
    assert chat.say(TURNS[1], 5)


def test_settings_of_a_conversation_and_of_a_turn() -> None:
    with moelab.load(stock.folder("qwen3_moe", chat_template=True), 8) as lab:
        said = {lab.chat(temperature=1.0, seed=seed).say("hi", 8) for seed in range(4)}
        assert len(said) > 1
        assert lab.chat(temperature=1.0, seed=2).say("hi", 8) in said
        calm = lab.generate("hi", 8, temperature=0.0)
        assert lab.chat(temperature=1.0, seed=2).say("hi", 8, temperature=0.0) == calm


def test_two_conversations_take_turns(lab: Lab) -> None:
    def alone(turns: tuple[str, ...]) -> list[str]:
        chat = lab.chat(temperature=0.0)
        return [chat.say(turn, 5) for turn in turns]

    want = alone(TURNS), alone(TURNS[::-1])
    one, two = lab.chat(temperature=0.0), lab.chat(temperature=0.0)
    got = [(one.say(a, 5), two.say(b, 5)) for a, b in zip(TURNS, TURNS[::-1], strict=True)]
    assert ([a for a, _ in got], [b for _, b in got]) == want


def test_repr(lab: Lab) -> None:
    chat = lab.chat()
    chat.say("hi", 2)
    assert "2 messages" in repr(chat) and "user: 'hi'" in repr(chat)


def test_lab_model() -> None:
    """The shipped model holds a conversation, exactly, at a quarter of its experts."""
    answers = []
    for capacity in (16, 64):
        with moelab.load("lab", capacity) as lab:
            chat = lab.chat(temperature=0.0, prefill_step_size=32)
            answers.append([chat.say(turn, 6) for turn in TURNS[:2]])
            assert mx.get_active_memory() > 0
    assert answers[0] == answers[1]
