"""The bench model: experts of realistic size, random weights, made on demand and kept.

The lab model's experts are 31 kB, and what a load costs there is mostly overhead. Published models
have experts of some megabytes; this one's are 2 MB (hidden 2048, intermediate 512, 4-bit), 128 of
them a layer, 8 of them a token, as in Qwen3-30B-A3B, but in four layers and with a small
vocabulary: about 1 GB. Weights are random, so the router spreads tokens nearly evenly, which is
the hardest case for a bank: nothing of this model's hit rates says anything about a trained one.

Scales are float32, as MLX's CPU kernels are many times slower in half precision.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import VARIABLE, cache_folder
from ..checkpoint.resolve import resolve
from ..display import size
from ..errors import MoelabError

BENCH_MODEL = "bench"
"""What benchmarks call this model."""

RECIPE = 1
"""Part of the folder's name; to be raised when what is written changes."""

GROUP = 64
"""Weights that share a scale."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SPARE_BYTES = 100_000_000
"""Disk space to leave free beside the model."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; a qwen3_moe."""

    layers: int = 4
    hidden: int = 2048
    intermediate: int = 512
    experts: int = 128
    top_k: int = 8
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 6144
    """As many as the lab model's tokenizer has."""

    def tensors(self) -> list[dict[str, tuple[tuple[int, ...], int]]]:
        """Returns shape and bits of each weight, by name, one group a shard."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shards: list[dict[str, tuple[tuple[int, ...], int]]] = [
            {"model.embed_tokens": ((self.vocabulary, self.hidden), 4)}
        ]
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shards.append(
                {
                    f"{at}.self_attn.q_proj": ((wide, self.hidden), 4),
                    f"{at}.self_attn.k_proj": ((narrow, self.hidden), 4),
                    f"{at}.self_attn.v_proj": ((narrow, self.hidden), 4),
                    f"{at}.self_attn.o_proj": ((self.hidden, wide), 4),
                    # mlx-lm keeps this family's routers at 8 bits.
                    f"{at}.mlp.gate": ((self.experts, self.hidden), 8),
                    f"{at}.mlp.switch_mlp.gate_proj": (
                        (self.experts, self.intermediate, self.hidden), 4),
                    f"{at}.mlp.switch_mlp.up_proj": (
                        (self.experts, self.intermediate, self.hidden), 4),
                    f"{at}.mlp.switch_mlp.down_proj": (
                        (self.experts, self.hidden, self.intermediate), 4),
                }
            )  # fmt: skip
        return shards

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, norms aside."""
        return sum(
            math.prod(shape) * bits // 8 + 2 * 4 * math.prod(shape) // GROUP
            for shard in self.tensors()
            for shape, bits in shard.values()
        )

    def config(self) -> dict[str, Any]:
        """Returns `config.json`."""
        gate = {"group_size": GROUP, "bits": 8}
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": 3 * self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "vocab_size": self.vocabulary,
            "eos_token_id": [0, 2],
            "quantization": {
                "group_size": GROUP,
                "bits": 4,
                **{f"model.layers.{n}.mlp.gate": gate for n in range(self.layers)},
            },
        }


def bench_model(progress: bool = True) -> Path:
    """Returns the folder of the bench model, which is made if it is not there yet.

    It lies in moelab's cache folder (see `moelab.cache`) and may be deleted at any time.

    Args:
        progress: Show a bar while it is made.

    Raises:
        MoelabError: If the disk has too little space, or the folder cannot be written.
    """
    folder = cache_folder() / f"bench-model-{RECIPE}"
    if not (folder / "config.json").is_file():
        make(folder, Shape(), progress=progress)
    return folder


def bench_folder(name_or_path: str | Path, progress: bool = True) -> Path:
    """Returns the folder of a model to be measured: `"bench"`, or whatever `moelab.load` takes."""
    if str(name_or_path) == BENCH_MODEL:
        return bench_model(progress)
    return resolve(name_or_path)


def make(folder: Path, shape: Shape, *, seed: int = 0, progress: bool = True) -> None:
    """Writes a model of random weights, whole or not at all, a layer at a time.

    Args:
        folder: Where to. If another process has made it meanwhile, its files stay.
        shape: The model's sizes.
        seed: Of the weights.
        progress: Show a bar.

    Raises:
        MoelabError: If the disk has too little space, or the folder cannot be written.
    """
    from tqdm.auto import tqdm

    hint = f"Free some space, or name another folder in the variable {VARIABLE}."
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        making.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(making).free
        if free < shape.nbytes + SPARE_BYTES:
            raise MoelabError(
                f"The bench model takes {size(shape.nbytes)} in {folder.parent}, and {size(free)} "
                f"are free there, of which {size(SPARE_BYTES)} are to stay so. {hint}"
            )
        random = np.random.default_rng(seed)
        shards = shape.tensors()
        names: dict[str, str] = {}
        for number, tensors in enumerate(
            tqdm(shards, desc="making the bench model", unit="shard", disable=not progress), 1
        ):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weights = _weights(random, tensors, shape, last=number == len(shards))
            mx.save_safetensors(str(making / file), weights, metadata={"format": "mlx"})
            names.update(dict.fromkeys(weights, file))
            del weights
        index = {"metadata": {"total_size": shape.nbytes}, "weight_map": names}
        (making / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (making / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
        for name in TOKENIZER:
            shutil.copyfile(resolve("lab") / name, making / name)
        _take_its_place(making, folder)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise MoelabError(
            f"The bench model could not be written to {folder.parent}: {error}."
            + (f" {hint}" if full else f" Name another folder in the variable {VARIABLE}.")
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _take_its_place(making: Path, folder: Path) -> None:
    try:
        making.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first
            raise


def _weights(
    random: np.random.Generator,
    tensors: dict[str, tuple[tuple[int, ...], int]],
    shape: Shape,
    last: bool,
) -> dict[str, mx.array]:
    """Draws one shard's tensors: random codes under one scale, which needs no quantising."""
    found: dict[str, mx.array] = {}
    for name, (dims, bits) in tensors.items():
        codes = random.integers(
            0, 1 << 32, size=(*dims[:-1], dims[-1] * bits // 32), dtype=np.uint32
        )
        # Codes 0 … n are spread evenly; these make their values' mean 0 and variance 1/width, the
        # embeddings' variance 1, and the router's 9/width, so that it is decided.
        top = (1 << bits) - 1
        deviation = 1.0 if "embed" in name else (3.0 if bits == 8 else 1.0) / math.sqrt(dims[-1])
        step = deviation / math.sqrt(((1 << bits) ** 2 - 1) / 12)
        groups = (*dims[:-1], dims[-1] // GROUP)
        found[f"{name}.weight"] = mx.array(codes)
        found[f"{name}.scales"] = mx.full(groups, step, mx.float32)
        found[f"{name}.biases"] = mx.full(groups, -step * top / 2, mx.float32)
        layer, attention, _ = name.partition(".self_attn.")
        if attention:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{norm}.weight"] = mx.ones(shape.hidden)
            for norm in ("q_norm", "k_norm"):
                found[f"{layer}.self_attn.{norm}.weight"] = mx.ones(shape.head_dim)
    if last:
        found["model.norm.weight"] = mx.ones(shape.hidden)
    return found
