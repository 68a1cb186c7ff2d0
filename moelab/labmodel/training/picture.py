"""The picture of the model card: which experts each domain uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moelab.labmodel.training.routing import Counts, shares

#: Layers that are shown: the first, one in the middle, the last.
LAYERS = (0, 3, 7)


def draw(counts: Counts, path: Path) -> None:
    """Draw, for some layers, each expert's share of each domain's choices.

    Experts are sorted by the domain that uses them most, so that specialisation
    shows as blocks along the diagonal.

    Args:
        counts: What `routing.read_texts` returned.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    domains = list(counts)
    use = np.stack([shares(used) for used in counts.values()])  # (domain, layer, expert)
    experts = use.shape[-1]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(len(LAYERS), 1)
    for ax, layer in zip(axes, LAYERS, strict=True):
        share = use[:, layer] * experts
        order = np.lexsort((-share.max(0), share.argmax(0)))
        image = ax.imshow(
            np.log2(np.clip(share[:, order], 0.125, 8)),
            aspect="auto",
            cmap="RdBu_r",
            vmin=-3,
            vmax=3,
            interpolation="nearest",
        )
        ax.set_yticks(range(len(domains)), domains)
        ax.set_xticks([])
        ax.set_ylabel(f"layer {layer}")
        edges = np.flatnonzero(np.diff(share.argmax(0)[order])) + 0.5
        for edge in edges:
            ax.axvline(edge, color="black", linewidth=0.6)
    axes[-1].set_xlabel(f"the layer's {experts} experts, grouped by the domain that uses them most")
    figure.suptitle("How often each domain chooses each expert, against an even share")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["⅛×", "¼×", "½×", "even", "2×", "4×", "8×"])
    figure.savefig(path, dpi=110)
