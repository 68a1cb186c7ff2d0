"""PyTorch and MLX compute the same model: the largest difference of their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def parity(folder: Path, tokens: int = 200, seed: int = 0) -> dict[str, Any]:
    """Run the float folder in `transformers` and in mlx-lm, on random tokens.

    Args:
        folder: What `export.write_float_folder` made.
        tokens: Length of the sequence.
        seed: Of the tokens.

    Returns:
        `largest_difference` and `largest_logit`, absolute.
    """
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    ids = np.random.default_rng(seed).integers(3, theirs.config.vocab_size, (1, tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    model, _ = load_model(folder)
    found = np.array(model(mx.array(ids)))
    return {
        "tokens": tokens,
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }
