"""From what a user names a model by to the folder that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

LAB_MODEL = "lab"
"""The name of the model that ships inside the package."""

# What mlx-lm downloads; anything less would fail its own check for completeness.
PATTERNS = [
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja",
]  # fmt: skip


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Finds the folder of a model.

    Args:
        name_or_path: `"lab"` (the shipped model), a folder, or a name on the Hugging Face hub,
            which is downloaded unless the local cache has it.
        revision: Branch, tag or commit on the hub.

    Returns:
        A folder that holds `config.json`.

    Raises:
        CheckpointError: If there is no such folder or name, or it is no model's.
    """
    if str(name_or_path) == LAB_MODEL:
        from ..labmodel import path as lab_path

        return lab_path()
    path = Path(name_or_path).expanduser()
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file. Give the folder that holds config.json.")
    elif path.is_absolute() or str(name_or_path).count("/") != 1:
        raise CheckpointError(
            f"There is no folder {str(name_or_path)!r}, and a name on the hub has the form "
            f"'owner/model'. Give one of these, or {LAB_MODEL!r} for the shipped model."
        )
    else:
        path = _from_hub(str(name_or_path), revision)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json, so it is no model's folder. "
            "Give the folder that holds config.json and model*.safetensors."
        )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        CheckpointError: If it is no JSON object or does not name a `model_type`.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'} names no model_type, so mlx-lm cannot tell the family."
        )
    return config


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=PATTERNS,
                local_files_only=local_files_only,
            )
        )

    try:
        return snapshot(local_files_only=False)
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a name on the hub.") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is not a folder here and not in the local cache of the hub, and the hub "
            "cannot be reached. Check the name and the connection, or give a folder."
        ) from error
    except Exception as error:
        # The hub's client raises its HTTP library's own errors, which differ by version. Offline
        # with the model in the cache, the cache is what the user wants.
        try:
            return snapshot(local_files_only=True)
        except Exception:
            raise CheckpointError(
                f"{name!r} could not be had from the hub ({type(error).__name__}: {error}) and "
                "is not in the local cache. Check the name and the connection, or give a folder."
            ) from error
