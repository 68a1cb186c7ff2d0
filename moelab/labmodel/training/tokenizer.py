"""A byte-level BPE of 6,144 tokens, trained on an even sample of the domains.

Numbers are split into digits and indentation stays in one token, which suits
arithmetic and code. Byte-level means that no text is unknown.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.labmodel.training.chat import BEGIN, CHAT_TEMPLATE, END
from moelab.labmodel.training.data import Document

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 6144
END_OF_TEXT = "<|endoftext|>"
SPECIAL = (END_OF_TEXT, BEGIN, END)

#: Qwen's pre-tokenisation: contractions, words, single digits, punctuation, space.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE_BYTES = 3_000_000


def train_tokenizer(documents: list[Document], seed: int = 0) -> Tokenizer:
    """Train the tokenizer.

    Args:
        documents: Documents of the train split.
        seed: Which passages are sampled.

    Returns:
        A tokenizer of the `tokenizers` library.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, seed), trainer)
    # Every training sequence began with the end-of-text token, and the model leans
    # on it being there: encoding adds it, and so does the chat template.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the files that `transformers` and mlx-lm read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [BEGIN],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _sample(documents: list[Document], seed: int) -> list[str]:
    """Take the same number of bytes of every domain, in pieces of whole documents."""
    rng = random.Random(seed)
    taken = []
    for domain in sorted({d.domain for d in documents}):
        members = [d.text for d in documents if d.domain == domain]
        pieces = [t[i : i + 20_000] for t in members for i in range(0, len(t), 20_000)]
        rng.shuffle(pieces)
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > _SAMPLE_BYTES:
                break
            taken.append(piece)
    return taken
