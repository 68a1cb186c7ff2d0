"""A model's identity, from its headers: cheap for 46 GB, and different when the weights differ.

Saved state (recordings, profiles, packed files) names the model it was made from by this
fingerprint and is refused for another. Names, dtypes, shapes and places of all tensors go into
it, the configuration, each shard's size, and a few bytes sampled from each shard (headers alone
would not tell two fine-tunes of one model apart).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from .headers import TensorSpan

SAMPLES_PER_SHARD = 16
SAMPLE_BYTES = 64


def fingerprint(folder: Path, spans: Mapping[str, TensorSpan]) -> str:
    """Returns 16 hexadecimal digits that name the checkpoint in `folder`.

    Args:
        folder: The model's folder; `config.json` is read.
        spans: From `headers.read_headers`.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, span in sorted(spans.items()):
        digest.update(repr((name, span.path.name, span.dtype, span.shape, span.offset)).encode())
    for path in sorted({span.path for span in spans.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb", buffering=0) as file:
            for i in range(SAMPLES_PER_SHARD):
                offset = size * (2 * i + 1) // (2 * SAMPLES_PER_SHARD)
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, offset))
    return digest.hexdigest()[:16]
