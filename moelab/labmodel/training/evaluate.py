"""Every figure of the model card, measured on the shipped 4-bit checkpoint.

```
python -m moelab.labmodel.training.evaluate --json results/labmodel.json
```

needs neither the corpus nor PyTorch: it measures on the excerpts and questions
that ship, with mlx-lm's own model and kernels. With `--float FOLDER`, what 4 bits
cost is measured against the unquantised weights; `--only parity` compares those
between PyTorch and MLX, and does need PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelab import labmodel

#: Bits per byte of the model that this one had to beat by a tenth.
TRIAL = {
    "python": 1.65,
    "prose": 2.00,
    "math": 1.65,
    "spanish": 1.63,
    "shell": 1.55,
    "guide": 1.55,
}
#: Tokens of a passage that is shown twice, and passages a domain.
COPY_TOKENS, COPY_TEXTS = 200, 5
#: Texts a domain on which 4 bits and float32 are compared.
FLOAT_TEXTS = 6


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for, and write it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=labmodel.path(), help="4-bit folder")
    parser.add_argument("--float", type=Path, help="float32 folder, for the cost of 4 bits")
    parser.add_argument("--json", type=Path, help="file to write, and to add to if it is there")
    parser.add_argument("--picture", type=Path, help="file for the picture of routing by domain")
    parser.add_argument("--texts", type=int, default=64, help="test texts a domain, at most")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("speed", "questions", "copying", "spot", "float", "texts", "parity"),
    )
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    for name, found in _measure(options):
        figures[name] = found
        print(json.dumps({name: found}, indent=1))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


def bits_per_byte(model: Any, tokenizer: Any, most: int = FLOAT_TEXTS) -> dict[str, float]:
    """Measure bits per byte of the first test texts of every domain.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer, which puts an end-of-text token in front.
        most: Texts a domain, at most.
    """
    figures = {}
    for domain in labmodel.DOMAINS:
        texts = labmodel.texts(domain, "test")[:most]
        sizes = [len(t["text"].encode()) for t in texts]
        bits = [text_bits(model, tokenizer, t) for t in texts]
        figures[domain] = sum(b * s for b, s in zip(bits, sizes, strict=True)) / sum(sizes)
    return figures


def text_bits(model: Any, tokenizer: Any, text: labmodel.Text) -> float:
    """Bits per byte of one excerpt by itself, from its first byte."""
    nats = float(losses(model, tokenizer.encode(text["text"])).sum())
    return nats / math.log(2) / len(text["text"].encode())


def spot_texts() -> list[labmodel.Text]:
    """The shortest test text of every domain, which a test measures again."""
    return [
        min(labmodel.texts(domain, "test"), key=lambda t: len(t["text"].encode()))
        for domain in labmodel.DOMAINS
    ]


def copying(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Measure how much cheaper a held-out passage is when it comes a second time.

    Returns:
        Domain to `first` and `second`, nats a token over the same tokens.
    """
    figures = {}
    between = tokenizer.encode("\n\n", add_special_tokens=False)
    for domain in labmodel.DOMAINS:
        first = second = count = 0.0
        for text in labmodel.texts(domain, "test")[:COPY_TEXTS]:
            start, *passage = tokenizer.encode(text["text"])[: COPY_TOKENS + 1]
            nats = losses(model, [start, *passage, *between, *passage])
            first += float(nats[: len(passage)].sum())
            second += float(nats[-len(passage) :].sum())
            count += len(passage)
        figures[domain] = {"first": first / count, "second": second / count}
    return figures


def speed(model: Any, tokenizer: Any, rounds: int = 5) -> dict[str, float]:
    """Measure tokens a second of prefill and decode, medians of several rounds."""
    from statistics import median

    from mlx_lm import stream_generate

    prompt = labmodel.texts("prose", "calibration")[0]["text"]
    last = []
    for _ in range(rounds):
        *_, response = stream_generate(model, tokenizer, prompt, max_tokens=100)
        last.append(response)
    return {
        "prefill_tokens_per_second": median(r.prompt_tps for r in last),
        "decode_tokens_per_second": median(r.generation_tps for r in last),
    }


def _measure(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    from mlx_lm import load

    from moelab.labmodel.training import asking, parity, picture, routing

    wanted = options.only or ("speed", "questions", "copying", "spot", "float", "texts")
    model, tokenizer = load(str(options.model))
    yield "checkpoint", describe(options.model)
    if "speed" in wanted:
        yield "speed", speed(model, tokenizer)
    if "questions" in wanted:
        yield "questions", asking.score(model, tokenizer)
    if "copying" in wanted:
        yield "copying", copying(model, tokenizer)
    if "spot" in wanted:
        yield "spot_bits_per_byte", {t["id"]: text_bits(model, tokenizer, t) for t in spot_texts()}
    if "float" in wanted and options.float:
        pair = {"texts_a_domain": FLOAT_TEXTS, "four_bit": bits_per_byte(model, tokenizer)}
        exact, _ = load(str(options.float))
        yield "cost_of_four_bits", {**pair, "float32": bits_per_byte(exact, tokenizer)}
    if "parity" in wanted and options.float:
        yield "parity", parity.parity(options.float)
    if "texts" in wanted:
        started = time.perf_counter()
        with routing.watched(model) as seen:
            bits, counts = routing.read_texts(model, tokenizer, seen, options.texts)
        yield "bits_per_byte", bits
        yield "trial_bits_per_byte", TRIAL
        yield "expert_use_divergence", routing.divergence(counts)
        yield "seconds_for_texts", round(time.perf_counter() - started, 1)
        if options.picture:
            picture.draw(counts, options.picture)


def describe(folder: Path) -> dict[str, Any]:
    """Name the checkpoint that was measured: sizes, and a hash of its weights."""
    import hashlib

    config = json.loads((folder / "config.json").read_text())
    kept = ("num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size", "vocab_size")
    return {
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **{key: config[key] for key in kept},
    }


def losses(model: Any, ids: list[int]) -> Any:
    """Nats of every token but the first, given those before it."""
    import mlx.core as mx
    from mlx import nn

    tokens = mx.array(ids)[None]
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])[0]


if __name__ == "__main__":
    main()
