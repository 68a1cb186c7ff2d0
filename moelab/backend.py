"""Which BLAS MLX multiplies unquantised matrices with, on Linux.

MLX's wheel for Linux carries a reference BLAS, which is slow. A program that has loaded OpenBLAS
for all to see before MLX is first imported makes MLX use that instead. It must be asked for: it
cannot be changed later in the process, and the last bits of results differ.

It helps unquantised models only. The shipped model on a Linux CPU, 257 prompt tokens: in float32,
3.6 times as fast with OpenBLAS; in its own 4 bits, whose kernels call no BLAS, no faster. So
nothing is loaded unless a user calls `use_openblas`, or the command line is given an unquantised
model; and `moelab.load` says once where it would help.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import MoelabError

LIBRARY = "libopenblas.so.0"

HELPS_FROM_BYTES = 50_000_000
"""Models with less than this are quick enough in any case."""

_HOW = (
    "Install it (Debian and Ubuntu: apt install libopenblas0-pthread) and call "
    "moelab.use_openblas() before anything that imports mlx; the moelab command does so by itself."
)


class _State:
    library: ctypes.CDLL | None = None
    told = False


def use_openblas(threads: int | None = None) -> bool:
    """Makes MLX use OpenBLAS in this process. Call it before anything else; Linux only.

    Args:
        threads: Threads of OpenBLAS. None takes 1, or what `OPENBLAS_NUM_THREADS` says: one
            token's products are too small to share.

    Returns:
        Whether MLX will use it; False where it is not installed, and on other systems, where MLX
        has a fast BLAS of its own.

    Raises:
        MoelabError: If mlx was imported before, so that it is too late.
        ValueError: If `threads` is not positive.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, got {threads}.")
    if sys.platform != "linux":
        return False
    if _State.library is None:
        if "mlx.core" in sys.modules:
            raise MoelabError(
                "mlx is imported already, and it keeps the BLAS that it found then. Restart Python "
                "and call moelab.use_openblas() first."
            )
        _State.library = _openblas(ctypes.RTLD_GLOBAL)
        if _State.library is None:
            return False
    if threads is not None or "OPENBLAS_NUM_THREADS" not in os.environ:
        _State.library.openblas_set_num_threads(threads or 1)
    return True


def openblas_in_use() -> bool:
    """Returns whether `use_openblas` has been called and found it."""
    return _State.library is not None


def use_openblas_for(name_or_path: str) -> None:
    """Calls `use_openblas` if the model is unquantised and it is not too late."""
    from .checkpoint.resolve import read_config, resolve

    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        folder: Path = resolve(name_or_path)
        if not _quantised(read_config(folder)):
            use_openblas()


def tell_of_openblas(config: Mapping[str, Any], nbytes: int) -> None:
    """Warns once if OpenBLAS would make this model faster and is not in use.

    Args:
        config: The model's configuration.
        nbytes: Bytes of all its weights.
    """
    import mlx.core as mx

    if (
        _State.told
        or sys.platform != "linux"
        or mx.default_device() != mx.Device(mx.cpu)
        or openblas_in_use()
        or _quantised(config)
        or nbytes < HELPS_FROM_BYTES
    ):
        return
    _State.told = True
    found = "is installed but not used" if _openblas(ctypes.RTLD_LOCAL) else "is not installed"
    warnings.warn(
        f"This model is not quantised, and OpenBLAS, which multiplies such matrices several times "
        f"as fast as what MLX brings along, {found}. {_HOW}",
        stacklevel=3,
    )


def _openblas(mode: int) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBRARY, mode=mode)
    except OSError:
        return None


def _quantised(config: Mapping[str, Any]) -> bool:
    return "quantization" in config or "quantization_config" in config
