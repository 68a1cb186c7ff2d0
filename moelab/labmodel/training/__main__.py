"""One command from text to checkpoint.

```
python -m moelab.labmodel.training --corpus FOLDER --out FOLDER --minutes 18 --device cuda
```

Steps: `prepare` (documents, splits, tokenizer, tokens), `train`, `export` (the
float and the 4-bit folder), and with `--evaluate` every figure of the model
card. `--only` runs some of them, for when training is done on another machine.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

STEPS = ("prepare", "train", "export")


def main(arguments: list[str] | None = None) -> None:
    """Run the steps that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m moelab.labmodel.training", description="Train the lab model."
    )
    parser.add_argument("--corpus", type=Path, help="folder of the .jsonl.xz text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--evaluate", action="store_true", help="measure the figures afterwards")
    _add_settings(parser)
    options = parser.parse_args(arguments)
    if "prepare" in options.only:
        if options.corpus is None:
            parser.error("--corpus is needed to prepare the data")
        prepare(options.corpus, options.out)
    if "train" in options.only:
        train(options)
    if "export" in options.only:
        export(options.out)
    if options.evaluate:
        from moelab.labmodel.training.evaluate import main as evaluate

        folders = {"--model": options.out / "checkpoint", "--float": options.out / "float"}
        evaluate([word for pair in folders.items() for word in map(str, pair)])


def prepare(corpus: Path, out: Path) -> None:
    """Text to splits, tokenizer, tokens, and the held-out texts that ship."""
    import json

    import numpy as np

    from moelab.labmodel.training import batches, chat, data, tokenizer
    from moelab.labmodel.training.settings import Architecture

    out.mkdir(parents=True, exist_ok=True)
    splits = data.split_documents(data.load_documents(corpus))
    texts = data.excerpts(splits)
    data.write_jsonl_xz(out / "texts.jsonl.xz", texts)
    questions = chat.held_out_questions(splits["test"])
    (out / "questions.json").write_text(json.dumps(questions, indent=1, ensure_ascii=False) + "\n")
    made = tokenizer.train_tokenizer(splits["train"])
    tokenizer.write_tokenizer(made, out / "tokenizer", Architecture.max_position_embeddings)
    batches.prepare(splits, made, out)
    held_out: dict[str, np.ndarray] = {}
    for domain in data.DOMAINS:
        members = [t["text"] for t in texts if (t["domain"], t["split"]) == (domain, "selection")]
        rows = [made.encode(t).ids for t in members]  # the first token is end-of-text
        ids = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = row
        held_out[f"{domain}/ids"] = ids
        held_out[f"{domain}/bytes"] = np.array(sum(len(t.encode()) for t in members))
    np.savez(out / "selection.npz", **held_out)  # type: ignore[arg-type]


def train(options: argparse.Namespace) -> None:
    """Run the training loop, or go on with it."""
    from moelab.labmodel.training.settings import Settings
    from moelab.labmodel.training.train import Trainer

    chosen = {f.name: getattr(options, f.name) for f in fields(Settings)}
    Trainer(options.out, Settings(**chosen), options.device).run()


def export(out: Path) -> None:
    """Write the float folder and, from it, the 4-bit checkpoint."""
    import torch

    from moelab.labmodel.training import export as folders
    from moelab.labmodel.training.settings import Architecture

    state = torch.load(out / "final.pt", map_location="cpu", weights_only=True)
    architecture = Architecture(**state["architecture"])
    folders.write_float_folder(state["model"], architecture, out / "tokenizer", out / "float")
    folders.quantise_folder(out / "float", out / "checkpoint")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from moelab.labmodel.training.settings import Settings

    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)


if __name__ == "__main__":
    main()
