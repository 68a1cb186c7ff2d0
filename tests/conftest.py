"""What holds for every test, and fixtures that several files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

# Before mlx-lm is imported, which keeps a stream of the default device: the tests compare bit for
# bit, which is promised for a CPU. `moelab check` measures Metal.
mx.set_default_device(mx.cpu)


# Notebooks run as tests with fewer texts: their kernels see this.
os.environ.setdefault("MOELAB_FAST", "1")


@pytest.fixture(scope="session")
def lab_path() -> Path:
    """The shipped model's folder, for stock mlx-lm to load."""
    from moelab.checkpoint.resolve import resolve

    return resolve("lab")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Garbage collections look through what a file's tests make, not through all that was before.

    Tests of memory collect often, and late in a session each would take a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
