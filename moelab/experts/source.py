"""Where a lab reads its experts from: the checkpoint itself, or a pack file made from it.

A pack file that is there is used. Where there is none, the checkpoint's own byte ranges are read,
and where these do not exist, because mlx-lm computes the experts while it loads, a pack file is
made first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.headers import TensorSpan
from ..checkpoint.pack import DTYPES, find_pack, pack, say
from ..checkpoint.packfile import Pack, read_pack, refusal
from ..checkpoint.provenance import Trace
from ..errors import CheckpointError
from ..families import SwitchSite
from .attach import origins_of

Origins = dict[tuple[str, str], tuple[TensorSpan, ...]]
"""Where each tensor of a layer is, by projection and name."""


def find_origins(
    folder: Path,
    sites: Sequence[SwitchSite],
    trace: Trace,
    spans: Mapping[str, TensorSpan],
    *,
    packed: bool | None = None,
    trust_remote_code: bool = False,
) -> list[Origins]:
    """Chooses where the experts of `sites` are read from, and makes a pack file where needed.

    Args:
        folder: The model's folder.
        sites: The layers that are to hold a part of their experts.
        trace: How the model was loaded.
        spans: Every tensor of the checkpoint.
        packed: True reads from a pack file and makes it if there is none that can be used; False
            reads from the checkpoint; None takes the pack file if there is one, else the
            checkpoint, and makes a pack file where the checkpoint cannot be read directly.
        trust_remote_code: As in `mlx_lm.load`, should a pack file have to be made.

    Returns:
        For each site, where each of its tensors is.

    Raises:
        CheckpointError: If the checkpoint is to be read directly and cannot be; if it cannot be
            read directly and its pack file is damaged, of another model or of another version;
            if a pack file cannot be made.
    """
    if not sites:
        return []
    if packed is False:
        return _direct(sites, trace, spans)
    try:
        if (found := find_pack(folder, spans)) is not None:
            return _from_pack(found, sites)
    except CheckpointError as refused:
        if packed is None:
            try:
                origins = _direct(sites, trace, spans)
            except CheckpointError:
                raise refused from None
            warnings.warn(
                f"{refused} Until then the experts are read from the checkpoint itself, which "
                "gives the same output.",
                stacklevel=3,
            )
            return origins
    if packed is None:
        try:
            return _direct(sites, trace, spans)
        except CheckpointError:
            say(
                f"mlx-lm computes the experts of {folder.name} while it loads them, so that they "
                "cannot be read from its files one by one. They are written to a pack file, once."
            )
    made = pack(folder, trust_remote_code=trust_remote_code)
    return _from_pack(read_pack(made), sites)


def _direct(
    sites: Sequence[SwitchSite], trace: Trace, spans: Mapping[str, TensorSpan]
) -> list[Origins]:
    return [origins_of(site, trace, spans) for site in sites]


def _from_pack(found: Pack, sites: Sequence[SwitchSite]) -> list[Origins]:
    """Returns the places in a pack file, having compared it with the model's own tensors."""
    for site in sites:
        layer = found.layers.get(site.path)
        if layer is None or layer.experts != site.experts:
            raise refusal(found.file, f"has not the {site.experts} experts of {site.path}")
        has = [(t.projection, t.key, t.dtype, t.shape) for t in layer.tensors]
        needs = [
            (name, key, DTYPES.get(array.dtype), tuple(array.shape[1:]))
            for name, key, array in site.tensors()
        ]
        if sorted(has) != sorted(needs, key=lambda entry: entry[:2]):
            raise refusal(found.file, f"has other tensors than {site.path} needs")
    return [found.spans(site.path) for site in sites]
