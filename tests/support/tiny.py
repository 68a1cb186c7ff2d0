"""Tiny random checkpoints of the mlx-lm families, and ways to damage them.

`build` writes a folder that plain `mlx_lm.load` accepts: the family's own model
class with seeded random weights, quantised as mlx-lm quantises, with a real byte-level
tokenizer. Weights come from numpy, drawn by name, so that a seed means the same model
in every layout, quantisation and number of shards.

`broken` writes a checkpoint with one thing wrong, for the tests of bad input.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

Layout = Literal["stacked", "per_expert"]
DType = Literal["float32", "bfloat16"]

VOCAB = 300
"""Size of every tiny vocabulary; the tokenizer has exactly as many entries."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens, with ids 0, 1 and 2; the last one ends a generation."""

QUANT: dict[str, Any] = {"group_size": 32, "bits": 4}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_COMMON,
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        **_COMMON,
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "olmoe": {
        **_COMMON,
        "model_type": "olmoe",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "mixtral": {
        **_COMMON,
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        **_COMMON,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "attention_bias": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": {
        **_COMMON,
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "head_dim": 32,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
}
"""A tiny configuration for each family that moelab promises to run exactly.

Capacities top-k, E/4, E/2 and E are all distinct, except for mixtral, whose E/4 is its
top-k. qwen3_moe's layer 1 and deepseek_v3's layer 0 are dense.
"""

DENSE: dict[str, Any] = {
    **_COMMON,
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "intermediate_size": 128,
}
"""A model without experts."""

PER_EXPERT: dict[str, tuple[str, ...]] = {
    "qwen2_moe": ("weight", "scales", "biases"),
    "qwen3_moe": ("weight",),
    "qwen3_next": ("weight",),
    "olmoe": ("weight", "scales", "biases"),
    "mixtral": ("weight", "scales", "biases"),
    "deepseek_v3": ("weight", "scales", "biases"),
}
"""The tensors of one expert that each family's `sanitize` stacks: with `weight` alone a
quantised per-expert checkpoint cannot be loaded by mlx-lm."""

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

_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_NORM_PLUS_ONE = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def experts(family: str) -> tuple[int, int]:
    """Numbers of routed experts a layer and of experts a token for a tiny family."""
    config = FAMILIES[family]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(config[n] for n in names if n in config), config["num_experts_per_tok"]


def moe_layers(family: str) -> list[int]:
    """Indices of the layers of a tiny family that have experts."""
    config = FAMILIES[family]
    dense = set(config.get("mlp_only_layers", []))
    first = config.get("first_k_dense_replace", 0)
    return [i for i in range(config["num_hidden_layers"]) if i >= first and i not in dense]


def capacities(family: str) -> list[int]:
    """The capacities to test, ascending and without repeats: top-k, E/4, E/2 and E."""
    number, top_k = experts(family)
    return sorted({top_k, max(top_k, number // 4), number // 2, number})


def prompt(n: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Draw `n` token ids at random, none of them special."""
    rng = np.random.default_rng([seed, 1])
    return [int(i) for i in rng.integers(len(SPECIAL), vocab, size=n)]


def build(
    folder: Path,
    family: str,
    *,
    quant: dict[str, Any] | None = QUANT,
    dtype: DType = "float32",
    seed: int = 0,
    layout: Layout = "stacked",
    shards: int = 1,
    chat_template: bool = False,
    generation_config: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny random checkpoint.

    Args:
        folder: Where to write it; created when absent.
        family: A key of `FAMILIES`, or "dense" for a model without experts.
        quant: `group_size`, `bits` and optionally `mode` ("affine", "mxfp4", "mxfp8",
            "nvfp4"), completed from the mode's defaults; None leaves it unquantised.
        dtype: Type of the floating tensors, quantisation scales included.
        seed: Chooses the weights, the same ones for every layout and sharding.
        layout: "stacked" writes the names of mlx-lm's modules, "per_expert" one tensor
            an expert, as published checkpoints have them.
        shards: Number of safetensors files.
        chat_template: Whether the tokenizer has one.
        generation_config: Contents of generation_config.json; None writes no such file.
        overrides: Entries of config.json that replace the family's.

    Returns:
        `folder`.

    Raises:
        ValueError: If mlx-lm could not load the layout that was asked for.
    """
    stacks = PER_EXPERT.get(family, ())
    if layout == "per_expert" and not stacks:
        raise ValueError(f"mlx-lm's {family} has no per-expert layout")
    if layout == "per_expert" and quant is not None and "scales" not in stacks:
        raise ValueError(f"mlx-lm's {family} stacks no scales: per_expert needs quant=None")

    base = DENSE if family == "dense" else FAMILIES[family]
    config = {**base, **(overrides or {})}
    model = _random_model(config, dtype, seed)
    if quant is not None:
        model, config = _quantised(model, config, quant)
    weights = dict(tree_flatten(model.parameters()))
    if layout == "per_expert":
        weights = _per_expert(weights, config)

    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, weights, shards)
    _write_json(folder / "config.json", dict(sorted(config.items())))
    _write_tokenizer(folder, chat_template)
    if generation_config is not None:
        _write_json(folder / "generation_config.json", generation_config)
    return folder


def _random_model(config: dict[str, Any], dtype: DType, seed: int) -> Any:
    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    model.eval()
    cast = getattr(model, "cast_predicate", lambda _: True)
    drawn = []
    for index, (name, old) in enumerate(tree_flatten(model.parameters())):
        value = mx.array(_draw(np.random.default_rng([seed, index]), name, old.shape))
        drawn.append((name, value.astype(getattr(mx, dtype)) if cast(name) else value))
    model.update(tree_unflatten(drawn))
    return model


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw one parameter by its name: norms near 1, routers widely spread."""
    unit = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return 0.2 * unit
    if "norm" in name or name.endswith("dt_bias"):
        # Between 0.5 and 1.5, where subtracting and adding 1 is exact in any float type.
        return 1 + np.clip(0.1 * unit, -0.5, 0.5)
    if name.endswith(("bias", "sinks")):
        return 0.1 * unit
    if "embed_tokens" in name:
        return unit
    if "conv1d" in name:
        return unit / np.float32(np.sqrt(shape[1]))
    # A router's logits get a standard deviation of about 3, the head's of about 2.
    spread = 1.0
    if re.search(r"(?<!expert_)gate\.weight$|router\.weight$", name):
        spread = 3.0
    elif name.startswith("lm_head"):
        spread = 2.0
    return unit * np.float32(spread / np.sqrt(shape[-1]))


def _quantised(
    model: Any, config: dict[str, Any], quant: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
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


def _per_expert(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Undo what the family's `sanitize` does to a checkpoint with one tensor an expert."""
    family = config["model_type"]
    out: dict[str, mx.array] = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.(\w+)", name)
        if found:
            block, projection, kind = found.groups()
            if family == "mixtral":
                projection = _MIXTRAL_NAMES[projection]
            for expert in range(value.shape[0]):
                out[f"{block}.experts.{expert}.{projection}.{kind}"] = value[expert]
        elif family == "qwen3_next" and name.endswith(_NORM_PLUS_ONE):
            out[name] = value - 1
        elif family == "qwen3_next" and name.endswith("conv1d.weight"):
            out[name] = value.moveaxis(1, 2)
        else:
            out[name] = value
    if family == "deepseek_v3" and "quantization" not in config:
        _join_kv_b(out, config)
    return out


def _join_kv_b(weights: dict[str, mx.array], config: dict[str, Any]) -> None:
    """Replace embed_q and unembed_out by the kv_b_proj that published checkpoints have."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        keys = weights.pop(f"{prefix}.embed_q.weight").swapaxes(-1, -2)
        values = weights.pop(f"{prefix}.unembed_out.weight")
        both = mx.concatenate([keys, values], axis=1)
        weights[f"{prefix}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])


def _write_shards(folder: Path, weights: dict[str, mx.array], shards: int) -> None:
    """Write the tensors in order, each file with about the same number of bytes."""
    total = sum(v.nbytes for v in weights.values())
    parts: list[dict[str, mx.array]] = [{} for _ in range(shards)]
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
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
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


def _write_tokenizer(folder: Path, chat_template: bool) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if chat_template:
        config["chat_template"] = _CHAT_TEMPLATE
    _write_json(folder / "tokenizer_config.json", config)


# Damage. Each function changes a good checkpoint in place.


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


def write_header(file: Path, header: dict[str, Any]) -> None:
    """Replace the header of a safetensors file and leave its data alone."""
    _, start = read_header(file)
    data = file.read_bytes()[start:]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    return sorted(folder.glob("model*.safetensors"))


def _expert_tensor(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """A shard, its header, and an expert's weight in it."""
    for file in shard_files(folder):
        header, _ = read_header(file)
        for name in header:
            if re.search(r"(switch_mlp|experts)\..*weight$", name) and "shared" not in name:
                return file, header, name
    raise ValueError(f"no expert tensor in {folder}")


def _missing_shard(folder: Path) -> None:
    files = shard_files(folder)
    if len(files) < 2:
        raise ValueError("a checkpoint that misses a shard needs at least 2 of them")
    files[-1].unlink()


def _truncated_shard(folder: Path) -> None:
    file = shard_files(folder)[-1]
    _, start = read_header(file)
    os.truncate(file, start + (file.stat().st_size - start) * 2 // 3)


def _empty_shard(folder: Path) -> None:
    os.truncate(shard_files(folder)[-1], 0)


def _header_too_long(folder: Path) -> None:
    file = shard_files(folder)[0]
    data = file.read_bytes()
    file.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])


def _header_not_json(folder: Path) -> None:
    file = shard_files(folder)[0]
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"?" + data[9:])


def _offsets_beyond(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    size = file.stat().st_size
    header[name]["data_offsets"] = [o + size for o in header[name]["data_offsets"]]
    write_header(file, header)


def _offsets_overlap(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    same = [
        n
        for n, entry in header.items()
        if n not in (name, "__metadata__")
        and (entry["shape"], entry["dtype"]) == (header[name]["shape"], header[name]["dtype"])
    ]
    header[name]["data_offsets"] = header[same[0]]["data_offsets"]
    write_header(file, header)


def _offsets_size(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin, end - 4]
    write_header(file, header)


def _missing_tensor(folder: Path) -> None:
    file, header, name = _expert_tensor(folder)
    del header[name]
    write_header(file, header)


def _missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    for file in shard_files(folder):
        file.unlink()


BROKEN: dict[str, Callable[[Path], None]] = {
    "missing_shard": _missing_shard,
    "truncated_shard": _truncated_shard,
    "empty_shard": _empty_shard,
    "header_too_long": _header_too_long,
    "header_not_json": _header_not_json,
    "offsets_beyond": _offsets_beyond,
    "offsets_overlap": _offsets_overlap,
    "offsets_size": _offsets_size,
    "missing_tensor": _missing_tensor,
    "missing_config": _missing_config,
    "no_weights": _no_weights,
}
"""What can be wrong with a checkpoint: each function damages a folder in place."""


def broken(folder: Path, kind: str, family: str = "qwen2_moe", **options: Any) -> Path:
    """Build a checkpoint of 2 shards with one thing wrong.

    Args:
        folder: Where to write it.
        kind: A key of `BROKEN`.
        family: A key of `FAMILIES`.
        options: Passed to `build`.

    Returns:
        `folder`.
    """
    build(folder, family, **{"shards": 2, **options})
    BROKEN[kind](folder)
    return folder
