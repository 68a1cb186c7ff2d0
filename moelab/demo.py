"""`moelab demo`: the shipped model at half its experts, recorded and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .experts.capacity import Capacity

if TYPE_CHECKING:
    from .lab import Lab
    from .routing.recording import Recording

PROMPTS = (
    "How do I list the files in a folder with `ls`?",
    "A baker has 24 eggs and uses 3 for each cake. How many cakes can she bake?",
)
"""Questions of kinds that the shipped model was trained on."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made."""

    folder: Path
    """Holds the charts and the recording."""
    charts: list[Path]
    recording: Recording
    answers: dict[str, str]
    """The model's answer to each prompt."""
    lab_repr: str
    seconds: float


def demo(
    name_or_path: str | Path = "lab",
    capacity: Capacity = 0.5,
    *,
    folder: str | Path = "moelab-demo",
    max_tokens: int = 100,
) -> Demo:
    """Generates with part of a model's experts, records it, and draws what the router did.

    Args:
        name_or_path: See `moelab.load`.
        capacity: See `moelab.load`.
        folder: Where charts and recording go; is made.
        max_tokens: Tokens for each answer.

    Returns:
        What was made and where.
    """
    import time

    from .loading import load

    begin = time.perf_counter()
    out = Path(folder)
    with load(name_or_path, capacity) as lab:
        out.mkdir(parents=True, exist_ok=True)  # after loading: a failed demo leaves nothing
        description = repr(lab)
        with lab.record() as recording:
            answers = {p: lab.generate(p, max_tokens, seed=0).strip() for p in PROMPTS}
        charts = draw(lab, recording, out)
        recording.save(out / "recording")
    return Demo(out, charts, recording, answers, description, time.perf_counter() - begin)


def draw(lab: Lab, recording: Recording, folder: Path) -> list[Path]:
    """Writes the three charts of a recording into a folder and returns their paths."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    from . import plots

    experts = max(site.experts for site in lab.sites)
    share = lab.capacity / experts
    charts = []
    with mpl.rc_context({"backend": "agg"}):
        for name, ax in {
            "routing": plots.expert_map(recording.routing, experts=experts),
            "hit-rate-by-layer": plots.hit_rate_by_layer(recording.routing, uniform=share),
            "hit-rate-over-time": plots.hit_rate_over_time(recording.tokens, uniform=share),
        }.items():
            charts.append(folder / f"{name}.png")
            figure = ax.get_figure(root=True)
            assert figure is not None
            figure.savefig(charts[-1], dpi=150, bbox_inches="tight")
            plt.close(figure)
    return charts


def summary(made: Demo) -> str:
    """Returns the demo's few lines for the terminal."""
    rates = made.recording.misses("phase").set_index("phase")
    lines = [made.lab_repr, ""]
    for prompt, answer in made.answers.items():
        lines += [f"> {prompt}", *(f"  {line}" for line in answer.splitlines()), ""]
    lines.append("What the router did")
    for phase in ("prefill", "decode"):
        if phase in rates.index:
            r = rates.loc[phase]
            lines.append(
                f"  {phase:<8} {int(r['routed']):>7,} routed slots, {1 - r['slots']:6.1%} hit, "
                f"missed mass {r['mass']:6.1%}"
            )
    loads = made.recording.loads
    read = int(loads["bytes"].sum())
    lines += [
        f"  loads    {len(loads):>7,} experts read from disk, {read / 1e6:,.1f} MB",
        "",
        f"Charts in {made.folder}/: {', '.join(path.name for path in made.charts)}",
        f"The recording, as parquet: {made.folder / 'recording'}/   ({made.seconds:.1f} s)",
    ]
    return "\n".join(lines)
