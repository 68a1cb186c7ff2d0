"""Widgets for notebooks: an explorer of a recording, and a live panel beside the exact run.

They are views of frames, and each has a static equivalent, since a rendered notebook on the web
shows no widgets. ipywidgets is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explorer_view import Explorer
    from .live_panel import Live

__all__ = ["Explorer", "Live", "explorer", "live"]


def explorer(recording: Any, **options: Any) -> Explorer:
    """Shows a recording's text: pick a token and see its experts, or an expert and its tokens.

    Args:
        recording: A `Recording`, also one that was read from disk; a replayed trace with `tokens`
            and `routing` will do.
        **options: See `moelab.widgets.Explorer`.

    Returns:
        The widget; as the last line of a cell it shows itself. `.static()` gives the same view
        without widgets.
    """
    from .explorer_view import Explorer

    return Explorer(recording, **options)


def live(lab: Any, **options: Any) -> Live:
    """Shows a panel that runs a prompt at a chosen capacity and miss action beside the exact run.

    Args:
        lab: A `Lab`; it has its own capacity, miss action and swap budget again after each run.
        **options: See `moelab.widgets.Live`.

    Returns:
        The widget; as the last line of a cell it shows itself. `.static()` gives the last run
        without widgets.
    """
    from .live_panel import Live

    return Live(lab, **options)


def __getattr__(name: str) -> Any:
    if name == "Explorer":
        from .explorer_view import Explorer

        return Explorer
    if name == "Live":
        from .live_panel import Live

        return Live
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
