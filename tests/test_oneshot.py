"""The one-call API, and from what a user says to tokens and a sampler."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import GenerationResponse

import moelab
from moelab import loading, oneshot
from moelab.errors import CapacityError, ClosedError, NotYetError
from moelab.lab import Lab
from moelab.prompting import Sampling, to_tokens
from tests.support import stock, tiny


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lab]]:
    """Every lab that the calls of a test loaded, in order."""
    made: list[Lab] = []
    load = loading.load

    def noted(*args: Any, **kwargs: Any) -> Lab:
        made.append(load(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(loading, "load", noted)
    yield made
    moelab.release()


def is_open(lab: Lab) -> bool:
    return not repr(lab).endswith("closed>")


def path(**options: Any) -> Path:
    return stock.folder("olmoe", **options)


PROMPT = tiny.prompt(12)


def test_generate_equals_stock() -> None:
    want = mlx_lm.generate(*stock.stock(path()), PROMPT, max_tokens=10)
    assert moelab.generate(path(), PROMPT, 10, capacity=4) == want
    responses = list(moelab.stream_generate(path(), PROMPT, 10, capacity=4))
    assert all(isinstance(r, GenerationResponse) for r in responses)
    assert "".join(r.text for r in responses) == want
    assert responses[-1].finish_reason == "length" or len(responses) < 10


def test_the_model_is_kept(loads: list[Lab]) -> None:
    for prompt in (PROMPT, PROMPT[:3]):
        moelab.generate(path(), prompt, 3, capacity=4)
        moelab.generate(str(path()), prompt, 3, capacity=4, kv_bits=None, temperature=0.5)
    assert len(loads) == 1
    assert loads[0].attachment.bank.layers[0].residency.slot_of, "it stays warm"


@pytest.mark.parametrize(
    "other", [{"capacity": 8}, {"capacity": 0.25}, {"dtype": "float32"}, {"model": "another"}]
)
def test_another_model_or_setting_closes_it_first(
    other: dict[str, Any], loads: list[Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are never two in memory: the first is closed before the second is loaded."""
    moelab.generate(path(), PROMPT, 2, capacity=4)
    noted = loading.load

    def watched(*args: Any, **kwargs: Any) -> Lab:
        assert not is_open(loads[0])
        return noted(*args, **kwargs)

    monkeypatch.setattr(loading, "load", watched)
    options = {"model": path(), "capacity": 4, **other}
    if other.get("model"):
        options["model"] = path(seed=1)
    moelab.generate(prompt=PROMPT, max_tokens=2, **options)
    assert [is_open(lab) for lab in loads] == [False, True]


def test_one_and_all_are_different_capacities(loads: list[Lab]) -> None:
    moelab.generate(path(), PROMPT, 2, capacity=1.0)
    with pytest.raises(CapacityError):
        moelab.generate(path(), PROMPT, 2, capacity=1)
    assert len(loads) == 1 and not is_open(loads[0])
    moelab.generate(path(), PROMPT, 2, capacity=1.0)
    assert len(loads) == 2


def test_release(loads: list[Lab]) -> None:
    """The memory is free at once, without waiting for the garbage collector."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    gc.disable()
    try:
        moelab.generate(path(), PROMPT, 2, capacity=4)
        assert mx.get_active_memory() > before + 50_000
        moelab.release()
        moelab.release()
        assert not is_open(loads[0])
        loads.clear()
        mx.clear_cache()
        assert mx.get_active_memory() < before + 1000
    finally:
        gc.enable()
    moelab.generate(path(), PROMPT, 2, capacity=4)
    assert len(loads) == 1


def test_a_generation_stops_when_its_model_is_closed() -> None:
    running = moelab.stream_generate(path(), PROMPT, 9, capacity=4)
    next(running)
    moelab.generate(path(), PROMPT, 2, capacity=8)
    with pytest.raises(ClosedError):
        list(running)


@pytest.mark.parametrize("option", ["cache_dir"])
def test_what_is_not_built_yet_is_refused(option: str, loads: list[Lab]) -> None:
    """Before anything is loaded, by all three entrances, and at the call."""
    given: dict[str, Any] = {option: "somewhere"}
    for ask in (
        lambda: moelab.generate(path(), PROMPT, 2, **given),
        lambda: moelab.stream_generate(path(), PROMPT, 2, **given),
        lambda: moelab.Session(path(), **given),
    ):
        with pytest.raises(NotYetError, match=rf"{option}='somewhere'.*not built yet.*Leave it"):
            ask()
    assert not loads


def test_session() -> None:
    model = path(chat_template=True)
    with moelab.Session(model, capacity=4, system="be brief", temperature=0.0) as session:
        assert 0 < session.memory_gb < 1
        first = session.generate("the router", 5)
        second = "".join(r.text for r in session.stream("and an expert", 5))
        assert [m["role"] for m in session.chat.messages] == [
            "system", "user", "assistant", "user", "assistant",
        ]  # fmt: skip
    with moelab.load(model, 4) as lab:
        chat = lab.chat("be brief", temperature=0.0)
        assert [chat.say("the router", 5), chat.say("and an expert", 5)] == [first, second]
    assert not is_open(session.lab)
    session.close()
    for ask in (session.generate, session.stream):
        with pytest.raises(ClosedError, match="Make another"):
            ask("more", 5)


def test_a_session_that_cannot_be_is_closed(loads: list[Lab]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        moelab.Session(path(), capacity=4)
    assert not is_open(loads[0])


def test_a_session_is_apart_from_the_kept_model(loads: list[Lab]) -> None:
    moelab.generate(path(), PROMPT, 2, capacity=4)
    with moelab.Session(path(chat_template=True), capacity=4):
        moelab.generate(path(), PROMPT, 2, capacity=4)
    assert len(loads) == 2 and is_open(loads[0])
    assert oneshot._kept is not None


def test_text_messages_and_ids() -> None:
    """Text is a chat turn where the tokenizer has a template, and raw text otherwise."""
    _, plain = stock.stock(path())
    _, chatty = stock.stock(path(chat_template=True))
    raw = list(plain.encode("the router"))
    turn = "<|im_start|>user\nthe router<|im_end|>\n<|im_start|>assistant\n"
    message = [{"role": "user", "content": "the router"}]
    assert to_tokens(plain, "the router") == to_tokens(plain, "the router", False) == raw
    assert to_tokens(chatty, "the router", False) == raw
    for prompt, template in (("the router", "auto"), ("the router", True), (message, "auto")):
        assert chatty.decode(to_tokens(chatty, prompt, template)) == turn
    assert to_tokens(chatty, [5, 6, 7]) == to_tokens(chatty, mx.array([5, 6, 7])) == [5, 6, 7]
    assert to_tokens(chatty, (5, 6)) == [5, 6]


RECOMMENDED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20}


def test_recommended_sampling() -> None:
    """The model's own recommendation, unless the caller says otherwise."""
    model = tiny.build(stock._root() / "warm", "olmoe", generation_config=RECOMMENDED)
    with moelab.load(model, 8) as lab:
        assert lab.sampling == Sampling(0.8, 0.9, 20)
        drawn = {lab.generate(PROMPT, 8, seed=seed) for seed in range(5)}
        assert len(drawn) > 1
        assert len({lab.generate(PROMPT, 8, seed=3) for _ in range(3)}) == 1
        greedy = {lab.generate(PROMPT, 8, temperature=0, seed=seed) for seed in range(3)}
        assert len(greedy) == 1
    with moelab.load(path(), 8) as lab:
        assert lab.sampling == Sampling()
        assert {lab.generate(PROMPT, 8)} == greedy
    calm = {**RECOMMENDED, "do_sample": False}
    model = tiny.build(stock._root() / "calm", "olmoe", generation_config=calm)
    with moelab.load(model, 8) as lab:
        assert lab.sampling == Sampling()


def test_sampling_equals_stock() -> None:
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    with moelab.load(path(), 4) as lab:
        ours = lab.generate(
            PROMPT, 12, temperature=0.7, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2,
            seed=5,
        )  # fmt: skip
    mx.random.seed(5)
    theirs = mlx_lm.generate(
        *stock.stock(path()), PROMPT, max_tokens=12,
        sampler=make_sampler(temp=0.7, top_p=0.9, top_k=30, min_p=0.01),
        logits_processors=make_logits_processors(repetition_penalty=1.2),
    )  # fmt: skip
    assert ours == theirs


def test_lab_model_by_one_call() -> None:
    text = moelab.generate("lab", "the router", 8, capacity=0.5, temperature=0.0)
    assert text == moelab.generate("lab", "the router", 8, capacity=1.0, temperature=0.0)
    assert text
