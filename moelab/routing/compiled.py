"""Numba, where it may or may not be able to keep what it compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiles a function over numpy arrays when it is first called.

    What was compiled is kept beside the module, or in the user's cache folder where the package's
    folder may not be written (numba's own order; `NUMBA_CACHE_DIR` names another folder). Where
    neither may be written, each process compiles anew.

    Args:
        function: Whose arguments and results numba can type.
    """
    import numba

    jit: Any = numba.njit
    made: Function
    try:
        made = jit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available": there is nowhere to keep it
        made = jit(nogil=True)(function)
    return made
