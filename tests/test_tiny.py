"""The tiny checkpoints are what they say they are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from safetensors import SafetensorError, safe_open

from tests.support import tiny

QUANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "affine4": {"group_size": 32, "bits": 4},
    "affine2": {"group_size": 64, "bits": 2},
    "affine8": {"group_size": 32, "bits": 8},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}
TOKENS = mx.array([tiny.prompt(24)])


def logits(folder: Path) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder))
    return np.array(model(TOKENS).astype(mx.float32))


def record_ids(model: Any) -> list[list[np.ndarray]]:
    """Make every SwitchGLU note the ids that it is asked for, one list a layer."""
    seen: list[list[np.ndarray]] = []
    for layer in model.layers:
        block = getattr(layer, "block_sparse_moe", None) or layer.mlp
        for name, child in list(block.items()):
            if isinstance(child, SwitchGLU):
                seen.append([])

                class Spy(SwitchGLU):
                    _note = seen[-1]

                    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
                        self._note.append(np.array(indices))
                        return super().__call__(x, indices)

                child.__class__ = Spy
                assert name in ("switch_mlp", "experts")
    return seen


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loads_and_runs(tmp_path: Path, family: str, quant: str) -> None:
    tiny.build(tmp_path, family, quant=QUANTS[quant])
    out = logits(tmp_path)
    assert out.shape == (1, 24, tiny.VOCAB)
    assert np.isfinite(out).all()
    assert out.std() > 0.5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_routing_varies(tmp_path: Path, family: str) -> None:
    """Most experts of every layer are used, and no one by every token."""
    model, _ = mlx_lm.load(str(tiny.build(tmp_path, family)))
    seen = record_ids(model)
    mx.eval(model(mx.array([tiny.prompt(64)])))
    number, top_k = tiny.experts(family)
    assert len(seen) == len(tiny.moe_layers(family)) >= 2
    for layer in seen:
        ids = np.concatenate([i.reshape(-1, top_k) for i in layer])
        counts = np.bincount(ids.ravel(), minlength=number)
        assert len(ids) == 64
        assert (counts > 0).sum() >= 0.75 * number
        assert counts.max() < 64


@pytest.mark.parametrize("family", tiny.PER_EXPERT)
@pytest.mark.parametrize("quant", QUANTS)
def test_per_expert_equals_stacked(tmp_path: Path, family: str, quant: str) -> None:
    options: dict[str, Any] = {"quant": QUANTS[quant], "seed": 3}
    if quant != "none" and "scales" not in tiny.PER_EXPERT[family]:
        with pytest.raises(ValueError, match="stacks no scales"):
            tiny.build(tmp_path / "p", family, layout="per_expert", **options)
        return
    stacked = tiny.build(tmp_path / "s", family, **options)
    split = tiny.build(tmp_path / "p", family, layout="per_expert", shards=3, **options)
    names = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(".experts.0." in n for n in names)
    assert not any("switch_mlp" in n for n in names)
    assert np.array_equal(logits(stacked), logits(split))


def test_shards_and_seeds(tmp_path: Path) -> None:
    one = tiny.build(tmp_path / "1", "olmoe", seed=1)
    three = tiny.build(tmp_path / "3", "olmoe", seed=1, shards=3)
    other = tiny.build(tmp_path / "o", "olmoe", seed=2)
    assert [f.name for f in tiny.shard_files(one)] == ["model.safetensors"]
    assert [f.name for f in tiny.shard_files(three)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert np.array_equal(logits(one), logits(three))
    assert not np.array_equal(logits(one), logits(other))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16(tmp_path: Path, family: str) -> None:
    """Quantised bfloat16 runs; unquantised experts do not, on a CPU."""
    assert np.isfinite(logits(tiny.build(tmp_path / "q", family, dtype="bfloat16"))).all()
    tiny.build(tmp_path / "n", family, dtype="bfloat16", quant=None)
    if mx.default_device() == mx.cpu:
        with pytest.raises(RuntimeError, match="GatherMM"):
            logits(tmp_path / "n")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_quick(tmp_path: Path, family: str) -> None:
    tiny.build(tmp_path / "warm", family)
    times = []
    for turn in range(3):
        start = time.perf_counter()
        tiny.build(tmp_path / str(turn), family)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_generates_text(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3_next", chat_template=True)
    model, tokenizer = mlx_lm.load(str(tmp_path))
    assert tokenizer.eos_token_ids == {2}
    assert len(tokenizer.get_vocab()) == tiny.VOCAB
    text = "Größe: 5 µm – the router ↦ expert\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    assert tokenizer.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    steps = list(mlx_lm.stream_generate(model, tokenizer, chat, max_tokens=20))
    assert steps[-1].finish_reason in ("length", "stop")
    plain = tiny.build(tmp_path / "plain", "olmoe")
    assert mlx_lm.load(str(plain))[1].chat_template is None


def test_cache_agrees_with_one_pass(tmp_path: Path) -> None:
    """Decoding token by token gives the logits of a single pass, within rounding."""
    for family in tiny.FAMILIES:
        model, _ = mlx_lm.load(str(tiny.build(tmp_path / family, family, quant=None)))
        cache = make_prompt_cache(model)
        steps = [model(TOKENS[:, i : i + 1], cache=cache) for i in range(TOKENS.shape[1])]
        ours = np.array(mx.concatenate(steps, axis=1))
        assert np.abs(ours - np.array(model(TOKENS))).max() < 2e-3, family


def test_dense(tmp_path: Path) -> None:
    tiny.build(tmp_path, "dense")
    assert np.isfinite(logits(tmp_path)).all()


def test_prompt() -> None:
    assert tiny.prompt(5) == tiny.prompt(5) != tiny.prompt(5, seed=1)
    assert min(tiny.prompt(5000)) == len(tiny.SPECIAL)
    assert max(tiny.prompt(5000)) == tiny.VOCAB - 1


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("kind", tiny.BROKEN)
def test_broken(tmp_path: Path, kind: str, layout: tiny.Layout) -> None:
    """Each damaged checkpoint is damaged, by the judgement of the safetensors library."""
    good = tiny.build(tmp_path / "good", "qwen2_moe", layout=layout, shards=2)
    bad = tiny.broken(tmp_path / "bad", kind, layout=layout)
    present = {p.name for p in bad.iterdir()}
    missing = {p.name for p in good.iterdir()} - present
    if kind == "missing_config":
        assert missing == {"config.json"}
    elif kind == "missing_shard":
        assert missing == {"model-00002-of-00002.safetensors"}
    elif kind == "no_weights":
        assert missing == {f.name for f in tiny.shard_files(good)}
    else:
        assert not missing
        with pytest.raises(SafetensorError):
            for file in tiny.shard_files(bad):
                with safe_open(file, framework="numpy") as opened:
                    opened.keys()
