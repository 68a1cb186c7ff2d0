"""The folder for what moelab makes once and keeps: generated models and the like.

Everything in it can be deleted at any time; it is made again when it is needed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "MOELAB_CACHE"
"""Environment variable that names another folder."""


def cache_folder() -> Path:
    """Returns moelab's folder in the user's cache; it need not exist yet.

    `MOELAB_CACHE` where that is set, else what the system has for it: `~/Library/Caches/moelab` on
    macOS, `$XDG_CACHE_HOME/moelab` or `~/.cache/moelab` elsewhere.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "moelab"
    # The XDG specification says to ignore a relative path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "moelab"
