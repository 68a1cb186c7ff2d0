"""Writes tiny random checkpoints that plain `mlx_lm.load` accepts.

A checkpoint is the family's own model class with seeded random weights, quantised as mlx-lm
quantises, with a real byte-level tokenizer. Weights come from numpy, drawn by name, so that a
seed means the same model in every layout, quantisation and number of shards.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .configs import VOCAB, Config

DType = Literal["float32", "bfloat16"]
Weights = dict[str, mx.array]
Arrange = Callable[[Weights, Config], Weights]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens, with ids 0, 1 and 2; the last one ends a generation."""

QUANT: Config = {"group_size": 32, "bits": 4}

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TOKENIZER_TEXT = (
    "the router sends each token to a few of the experts and the others rest on disk ",
    "an expert that is not in memory is read from its shard when it is needed ",
    "in the end the weighted sum of what they said is added to the residual stream ",
)


def prompt(n: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Draws `n` token ids at random, none of them special."""
    rng = np.random.default_rng([seed, 1])
    return [int(i) for i in rng.integers(len(SPECIAL), vocab, size=n)]


def build(
    folder: Path,
    config: Config,
    *,
    quant: Config | None = QUANT,
    dtype: DType = "float32",
    seed: int = 0,
    arrange: Arrange | None = None,
    shards: int = 1,
    chat_template: bool = False,
    generation_config: Config | None = None,
) -> Path:
    """Writes a tiny random checkpoint.

    Args:
        folder: Where to write it; created when absent.
        config: The whole config.json.
        quant: `group_size`, `bits` and optionally `mode` ("affine", "mxfp4", "mxfp8",
            "nvfp4"), completed from the mode's defaults; None leaves it unquantised.
        dtype: Type of the floating tensors, quantisation scales included.
        seed: Chooses the weights, the same ones for every arrangement and sharding.
        arrange: Given the tensors by the names of mlx-lm's modules and the config, returns
            those to write; None writes them as they are.
        shards: Number of safetensors files.
        chat_template: Whether the tokenizer has one.
        generation_config: Contents of generation_config.json; None writes no such file.

    Returns:
        `folder`.
    """
    model = random_model(config, dtype, seed)
    if quant is not None:
        model, config = _quantised(model, config, quant)
    weights = dict(tree_flatten(model.parameters()))
    if arrange is not None:
        weights = arrange(weights, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, weights, shards)
    write_json(folder / "config.json", dict(sorted(config.items())))
    write_tokenizer(folder, chat_template)
    if generation_config is not None:
        write_json(folder / "generation_config.json", generation_config)
    return folder


def random_model(config: Config, dtype: DType = "float32", seed: int = 0) -> Any:
    """Returns mlx-lm's model of a configuration, with seeded weights."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model: Any = model_class(args_class.from_dict(config))
    model.eval()
    cast = getattr(model, "cast_predicate", lambda _: True)
    drawn = []
    for index, (name, old) in enumerate(tree_flatten(model.parameters())):
        rng = np.random.default_rng([seed, index])
        if not mx.issubdtype(old.dtype, mx.floating):  # packed by the model class itself
            packed = rng.integers(2**32, size=old.shape, dtype=np.uint32)
            drawn.append((name, mx.array(packed).astype(old.dtype)))
            continue
        value = mx.array(_draw(rng, name, old.shape))
        drawn.append((name, value.astype(getattr(mx, dtype)) if cast(name) else value))
    model.update(tree_unflatten(drawn))
    return model


_ROUTER = re.compile(
    r"(?<!expert_)gate\.weight$|router\.weight$"
    r"|router\.(layer|proj|classifier)\.weight$|mlp\.gate\.(gate_proj|proj|wg)\.weight$"
)
_EMBEDDING = re.compile(r"embed_tokens|word_embeddings|wte\.weight")


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws one parameter by its name: norms near 1, routers widely spread."""
    unit = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return 0.2 * unit
    if "norm" in name or name.endswith(("dt_bias", "scale", "scalar")):
        # Between 0.5 and 1.5, where subtracting and adding 1 is exact in any float type.
        return 1 + np.clip(0.1 * unit, -0.5, 0.5)
    if name.endswith(("bias", "sinks")):
        return 0.1 * unit
    if _EMBEDDING.search(name):
        return unit
    if "conv1d" in name:
        return unit / np.float32(np.sqrt(shape[1]))
    # A router's logits get a standard deviation of about 3, the head's of about 2.
    spread = 1.0
    if _ROUTER.search(name):
        spread = 3.0
    elif name.startswith("lm_head"):
        spread = 2.0
    return unit * np.float32(spread / np.sqrt(shape[-1]))


def _quantised(model: Any, config: Config, quant: Config) -> tuple[Any, Config]:
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(
            model,
            config,
            quant.get("group_size"),
            quant.get("bits"),
            mode=quant.get("mode", "affine"),
        )
    return model, config


def write_shards(folder: Path, weights: Weights, shards: int) -> None:
    """Writes the tensors in order, each file with about the same number of bytes."""
    total = sum(v.nbytes for v in weights.values())
    parts: list[Weights] = [{} for _ in range(shards)]
    done = 0
    for name, value in weights.items():
        parts[min(shards - 1, done * shards // total)][name] = mx.contiguous(value)
        done += value.nbytes
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, chat_template: bool) -> None:
    """Writes a byte-level tokenizer with exactly `VOCAB` entries."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config: Config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if chat_template:
        config["chat_template"] = _CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", config)
