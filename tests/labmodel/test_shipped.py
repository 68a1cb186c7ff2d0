"""The shipped checkpoint is what its card says."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from moelab import labmodel
from moelab.labmodel.training.asking import is_right
from moelab.labmodel.training.evaluate import describe, spot_texts, text_bits

RESULTS = Path(__file__).resolve().parents[2] / "results" / "labmodel.json"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from mlx_lm import load

    return load(str(labmodel.path()))


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_importing_it_loads_neither_mlx_nor_torch() -> None:
    code = (
        "import sys; before = set(sys.modules); import moelab.labmodel; "
        "added = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not added & {'torch', 'mlx', 'mlx_lm'}, added"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_architecture() -> None:
    config = json.loads((labmodel.path() / "config.json").read_text())
    assert config["model_type"] == "qwen3_next"
    assert config["num_experts"] >= 64
    assert config["num_experts"] / config["num_experts_per_tok"] >= 10
    assert config["num_experts_per_tok"] <= 8
    assert config["num_hidden_layers"] >= 6
    assert config["decoder_sparse_step"] == 1
    assert config["max_position_embeddings"] >= 2048
    assert config["quantization"]["bits"] == 4
    for key in ("rope_theta", "partial_rotary_factor", "full_attention_interval"):
        assert key in config


def test_size() -> None:
    assert sum(f.stat().st_size for f in labmodel.path().iterdir()) <= 20_000_000


def test_loads_and_answers(loaded: tuple[Any, Any]) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm import generate

    model, tokenizer = loaded
    kinds = {str(a.dtype) for _, a in tree_flatten(model.parameters())}
    assert kinds == {"mlx.core.float32", "mlx.core.uint32"}
    parameters = sum(a.size * (8 if a.itemsize == 4 else 1) for _, a in _weights(model))
    assert 15e6 <= parameters <= 40e6
    asked = next(q for q in labmodel.questions() if q["tool"] == "brushtopbm")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked["question"]}], add_generation_prompt=True
    )
    assert is_right(generate(model, tokenizer, prompt, max_tokens=30), asked["tool"])


def _weights(model: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return [
        (name, array)
        for name, array in tree_flatten(model.parameters())
        if name.endswith("weight") and str(array.dtype) == "mlx.core.uint32"
    ]


def test_chat_template(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|endoftext|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_ids == {
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    }


def test_encoding_starts_with_end_of_text_and_loses_nothing(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for domain in labmodel.DOMAINS:
        text = labmodel.texts(domain, "selection")[0]["text"]
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_texts() -> None:
    for domain in labmodel.DOMAINS:
        assert len(labmodel.texts(domain, "test")) >= 30
        for split in labmodel.SPLITS:
            assert len(labmodel.texts(domain, split)) >= 16
        titles = [{t["title"] for t in labmodel.texts(domain, s)} for s in labmodel.SPLITS]
        assert all(not a & b for a, b in combinations(titles, 2))
    assert len({t["title"] for t in labmodel.texts("prose", "test")}) >= 3
    assert len({t["id"] for t in labmodel.texts()}) == len(labmodel.texts())
    assert all(len(t["text"].encode()) <= 2201 for t in labmodel.texts())


def test_unknown_domain_or_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"domain must be one of python, .*, got 'poetry'"):
        labmodel.texts("poetry")
    with pytest.raises(ValueError, match=r"split must be one of calibration, .*, got 'train'"):
        labmodel.texts(split="train")


def test_questions_are_of_held_out_pages() -> None:
    asked = labmodel.questions()
    assert len({q["page"] for q in asked}) == 50
    for question in asked:
        assert question["page"] in question["question"].lower()
        assert question["page"] not in question["described"].lower().split()


def test_the_card_is_of_this_checkpoint(figures: dict[str, Any]) -> None:
    assert figures["checkpoint"] == describe(labmodel.path())
    for domain in labmodel.DOMAINS:
        assert figures["bits_per_byte"][domain] <= 0.9 * figures["trial_bits_per_byte"][domain]


def test_bits_per_byte_are_those_of_the_card(
    loaded: tuple[Any, Any], figures: dict[str, Any]
) -> None:
    for text in spot_texts():
        measured = text_bits(*loaded, text)
        assert measured == pytest.approx(figures["spot_bits_per_byte"][text["id"]], rel=0.01)
