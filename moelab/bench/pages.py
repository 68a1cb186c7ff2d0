"""What the pages of all benchmarks share: what was measured on, and writing them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..machine import Machine


def machine_line(machine: Machine) -> str:
    """Returns one sentence on the machine and what else it was doing."""
    m = machine
    return (
        f"{m.chip}, {m.cores} cores, {m.system}, MLX on {m.backend}, mlx {m.versions['mlx']}, "
        f"mlx-lm {m.versions['mlx-lm']}; other programs used {m.busy:.0%} of the processor "
        "just before."
    )


def save(result: Any, name: str, folder: Path) -> None:
    """Writes `name.md` and `name.json`, each whole or not at all.

    Args:
        result: A dataclass with a `page`.
        name: Such as `bench-decode`.
        folder: Made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {
        f"{name}.md": result.page() + "\n",
        f"{name}.json": json.dumps(asdict(result), indent=1) + "\n",
    }.items():
        made = folder / f".{file}.{os.getpid()}"
        made.write_text(text)
        made.replace(folder / file)
