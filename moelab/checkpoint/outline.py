"""A checkpoint's layout without its weights.

For a model that lies here, that is its folder. For one on the hub only `config.json` and the
shards' headers are fetched, and files of the same layout are made from them in a temporary
folder, with a hole where the data would be: they take no space, and mlx-lm's own loading, which
evaluates nothing, works on them as on the real ones. So what is said of a model before it is
downloaded comes from the same code as what is done with it afterwards.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .headers import shard_paths
from .resolve import LAB_MODEL, PATTERNS, resolve


@dataclass(frozen=True, slots=True)
class Outline:
    """A folder with a checkpoint's layout."""

    folder: Path
    local: bool
    """The weights are here: `folder` is the model's own."""


@contextmanager
def open_outline(name_or_path: str | Path, revision: str | None = None) -> Iterator[Outline]:
    """Lends a folder from which a model's layout can be read; downloads no weights.

    Args:
        name_or_path: See `resolve.resolve`.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: If there is no such model, or the hub cannot be reached.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if name == LAB_MODEL or path.exists() or path.is_absolute() or name.count("/") != 1:
        yield Outline(resolve(name_or_path, revision), True)
        return
    cached = _cached(name, revision)
    if cached is not None:
        yield Outline(cached, True)
        return
    with tempfile.TemporaryDirectory(prefix="moelab-plan-") as made:
        _fetch_layout(name, revision, Path(made))
        yield Outline(Path(made), False)


def _cached(name: str, revision: str | None) -> Path | None:
    """Returns the folder of a model that was downloaded whole, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=PATTERNS, local_files_only=True
            )
        )
        shard_paths(folder)
    except Exception:  # whatever is the matter with the cache, the hub is asked next
        return None
    return folder if (folder / "config.json").is_file() else None


def _fetch_layout(name: str, revision: str | None, folder: Path) -> None:
    """Makes a folder with the configuration and hollow shards of a model on the hub."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    def fetch(file: str) -> None:
        shutil.copyfile(hf_hub_download(name, file, revision=revision), folder / file)

    try:
        fetch("config.json")
        with suppress(EntryNotFoundError):
            fetch("hf_quant_config.json")  # where NVIDIA's exports say how they are quantised
        shards = get_safetensors_metadata(name, revision=revision).files_metadata
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a name on the hub.") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name!r} is given on the hub only to who has accepted its terms. Accept them on the "
            "model's page and log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"There is no model {name!r}{f' at revision {revision!r}' if revision else ''} on the "
            "hub, or it is private. Check the name, or log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{name!r} has no config.json on the hub: it is no model.") from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"{name!r} has no model.safetensors on the hub, and mlx-lm reads no other weights."
        ) from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"A header of {name!r} on the hub is damaged: {error}") from error
    except Exception as error:
        # The hub's client raises its HTTP library's own errors, which differ by version.
        raise _unreachable(name, error) from error
    for file, metadata in shards.items():
        _write_hollow(name, folder, file, metadata)


def _unreachable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name!r} is not a folder here and not in the local cache of the hub, and the hub cannot "
        f"be reached ({type(error).__name__}: {error}). Check the name and the connection, or "
        "give a folder."
    )


def _write_hollow(name: str, folder: Path, file: str, metadata: Any) -> None:
    """Writes a safetensors file whose header is real and whose data is a hole."""
    if Path(file).name != file or file.startswith("."):
        raise CheckpointError(f"{name!r} names {file!r} as a shard, which is no file name.")
    header = {
        tensor: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for tensor, info in metadata.tensors.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    except (OSError, ValueError, OverflowError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"A file with the layout of {file!r} of {name!r} cannot be made: {error}"
        ) from error
