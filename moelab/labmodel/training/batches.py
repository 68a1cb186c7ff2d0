"""Documents to token arrays, and token arrays to training sequences.

`prepare` tokenises once and writes one `tokens.npz`. `Batches` then mixes: each
sequence is filled with pieces, drawn by source so that novels, two thirds of
the text, do not drown the rest. Every piece starts after an end-of-text token,
as the held-out excerpts do when they are measured. Some pieces say the same
passage twice, a tenth of those a passage of random tokens, so that the model
learns to copy what it has not memorised.

A batch depends on the seed and its number only, so a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moelab.labmodel.training import chat
from moelab.labmodel.training.data import DOMAINS, Document
from moelab.labmodel.training.tokenizer import END_OF_TEXT, SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Share of training tokens by source. "copy" repeats passages of the others.
MIXTURE: dict[str, float] = {
    "python": 0.17,
    "prose": 0.33,
    "math": 0.05,
    "spanish": 0.14,
    "shell": 0.05,
    "guide": 0.08,
    "chat_shell": 0.07,
    "chat_math": 0.02,
    "chat_python": 0.02,
    "copy": 0.07,
}
_WHOLE = 700  # documents of up to so many tokens are taken whole
_LONGEST = 2048


def prepare(splits: dict[str, list[Document]], tokenizer: Tokenizer, out: Path) -> None:
    """Tokenise the train split and write `tokens.npz`.

    Args:
        splits: Documents by split.
        tokenizer: The trained tokenizer.
        out: Folder to write to.
    """
    texts = {domain: [d.text for d in splits["train"] if d.domain == domain] for domain in DOMAINS}
    texts |= chat.pairs(splits["train"])
    newline = np.array(
        ["\n" in tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())], dtype=bool
    )
    arrays: dict[str, np.ndarray] = {"newline": newline}
    for source, members in texts.items():
        encoded = [
            np.array(e.ids, dtype=np.uint16)
            for at in range(0, len(members), 256)
            for e in tokenizer.encode_batch_fast(members[at : at + 256], add_special_tokens=False)
        ]
        arrays[f"{source}/tokens"] = np.concatenate(encoded)
        arrays[f"{source}/ends"] = np.cumsum([len(e) for e in encoded]).astype(np.int64)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "tokens.npz", **arrays)  # type: ignore[arg-type]
    sizes = {s: int(arrays[f"{s}/ends"][-1]) for s in texts}
    (out / "tokens.json").write_text(json.dumps({"train_tokens": sizes}, indent=2) + "\n")


class Batches:
    """Training sequences on demand.

    Attributes:
        length: Tokens a sequence, one more than the model sees.
        vocabulary: Number of token ids.
    """

    def __init__(self, path: Path, length: int, vocabulary: int, seed: int = 0) -> None:
        """Read `tokens.npz`.

        Args:
            path: The file that `prepare` wrote.
            length: Tokens of a sequence that the model sees.
            vocabulary: Number of token ids.
            seed: What the batches are drawn from.
        """
        stored = np.load(path)
        self.length, self.vocabulary, self.seed = length + 1, vocabulary, seed
        self._end = SPECIAL.index(END_OF_TEXT)
        self._tokens = {s: stored[f"{s}/tokens"] for s in MIXTURE if s != "copy"}
        self._ends = {s: stored[f"{s}/ends"] for s in self._tokens}
        newline = stored["newline"]
        self._lines = {s: np.flatnonzero(newline[t]) + 1 for s, t in self._tokens.items()}
        self._line_ends = self._common_line_ends()
        self._sources = list(MIXTURE)
        self._chance = self._chances()

    def batch(self, number: int, size: int) -> np.ndarray:
        """Make batch `number`: `size` sequences, int64, (size, length)."""
        rng = np.random.default_rng([self.seed, number])
        out = np.empty((size, self.length), dtype=np.int64)
        for row in out:
            at = 0
            while at < self.length:
                source = self._sources[rng.choice(len(self._sources), p=self._chance)]
                piece = self._piece(rng, source)
                taken = min(len(piece), self.length - at)
                row[at : at + taken] = piece[:taken]
                at += taken
        return out

    def _piece(self, rng: np.random.Generator, source: str) -> np.ndarray:
        if source == "copy":
            body = self._copy(rng)
        else:
            body = self._passage(rng, source)
        return np.concatenate(([self._end], body))

    def _passage(self, rng: np.random.Generator, source: str) -> np.ndarray:
        """A whole short document, or a passage of a long one that begins at a line."""
        tokens, ends, lines = self._tokens[source], self._ends[source], self._lines[source]
        at = int(rng.integers(len(tokens)))
        document = int(np.searchsorted(ends, at, side="right"))
        first, last = (int(ends[document - 1]) if document else 0), int(ends[document])
        if last - first <= _WHOLE:
            return tokens[first:last]
        start = first
        if rng.random() > 0.1:
            start = int(lines[min(int(np.searchsorted(lines, at)), len(lines) - 1)])
            if not first <= start < last:
                start = first
        return tokens[start : min(last, start + int(rng.integers(200, _LONGEST)))]

    def _copy(self, rng: np.random.Generator) -> np.ndarray:
        """A passage twice or three times, with a random separator."""
        size = int(np.exp(rng.uniform(np.log(12), np.log(600))))
        if rng.random() < 0.25:
            passage = rng.integers(len(SPECIAL), self.vocabulary, size)
        else:
            source = DOMAINS[rng.integers(len(DOMAINS))]
            passage = self._passage(rng, source)[:size]
            if rng.random() < 0.15:
                passage = rng.permutation(passage)
        between = rng.choice(self._line_ends, int(rng.integers(0, 3)))
        times = 2 if rng.random() < 0.8 else 3
        return np.concatenate([passage, *([between, passage] * (times - 1))])

    def _chances(self) -> np.ndarray:
        """Chance that a piece is of a source, so that its tokens have the wanted share."""
        rng = np.random.default_rng(self.seed)
        mean = [np.mean([len(self._piece(rng, s)) for _ in range(200)]) for s in self._sources]
        chance = np.array([MIXTURE[s] for s in self._sources]) / np.array(mean)
        return chance / chance.sum()

    def _common_line_ends(self) -> np.ndarray:
        """The four tokens that end a line most often."""
        tokens, lines = self._tokens["guide"], self._lines["guide"]
        values, counts = np.unique(tokens[lines - 1], return_counts=True)
        return values[np.argsort(-counts)[:4]].astype(np.int64)
