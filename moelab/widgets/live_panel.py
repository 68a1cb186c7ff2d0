"""The live panel: a prompt at a chosen capacity and miss action, beside the exact run."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import traitlets

from ..errors import MoelabError, StudyError
from . import render

if TYPE_CHECKING:
    from ..lab import Lab

ACTIONS = ("load", "low_bit", "substitute", "reroute", "drop", "wrong_slot")


@dataclass
class Side:
    """One of the two runs."""

    name: str
    """What it was run with."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    """Wall time of the generated tokens after the first."""
    hits: int = 0
    routed: int = 0
    """Slots of the generated tokens, and how many were in memory."""
    done: bool = False

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first; None where too few were generated."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 else None

    @property
    def facts(self) -> str:
        """The figures, in words."""
        parts = [f"{len(self.tokens)} tokens"]
        if self.speed is not None:
            parts.append(f"{self.speed:.1f} tokens/s")
        if self.routed:
            parts.append(f"{self.hits / self.routed:.0%} hits")
        return ", ".join(parts) + ("" if self.done else " …")


class Live(ipw.VBox):
    """Runs a prompt exactly and with a miss action, and shows where the two part.

    Both runs are greedy unless a temperature is given, and then have the same seed; the bank is in
    its initial contents before each. In a notebook they run between the kernel's other messages,
    in its own thread, so that Cancel is heard after each token: do not use the lab from other cells
    meanwhile. Elsewhere `run()` returns when both are done. Figures of speed are of the generated
    tokens, one run after the other in the same process: to compare speeds, use `moelab bench`.

    Args:
        lab: The model; it must hold the panel's capacities.
        prompt: What is in the prompt's box at first.
        capacity: The capacity at first; None takes the lab's.
        on_miss: The action at first.
        max_tokens: Tokens to generate at most, at first.
        temperature: 0 takes the most likely token.
        seed: Of both runs.

    Attributes:
        busy: Whether it runs.
        fork: The first token in which the two differ, counted from 0; None where there is none.
        exact: The exact run.
        other: The run at the chosen capacity and miss action.
    """

    busy = traitlets.Bool(False)
    fork = traitlets.Int(None, allow_none=True)

    def __init__(
        self,
        lab: Lab,
        *,
        prompt: str = "How do I list the files in a folder?",
        capacity: int | None = None,
        on_miss: str = "drop",
        max_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if on_miss not in ACTIONS:
            raise StudyError(f"on_miss must be one of {', '.join(ACTIONS)}, got {on_miss!r}.")
        least = max(site.top_k for site in lab.sites)
        most = min(site.experts for site in lab.sites)
        chosen = lab.capacity if capacity is None else capacity
        if not least <= chosen <= most:
            raise StudyError(f"capacity must be from {least} to {most}, got {chosen}.")
        self.lab = lab
        self.exact = Side("exact")
        self.other = Side(on_miss)
        self._temperature, self._seed = temperature, seed
        self._cancelled = False
        self._task: Any = None
        super().__init__()
        wide = ipw.Layout(width="98%")
        self.prompt = ipw.Textarea(prompt, description="prompt", rows=2, layout=wide)
        self.capacity = ipw.IntSlider(
            chosen, min=least, max=most, description="capacity", continuous_update=False
        )
        self.on_miss = ipw.Dropdown(options=list(ACTIONS), value=on_miss, description="on a miss")
        self.max_tokens = ipw.BoundedIntText(max_tokens, min=1, max=2000, description="tokens")
        self.run_button = ipw.Button(description="Run", button_style="primary")
        self.cancel_button = ipw.Button(description="Cancel", disabled=True)
        self.message = ipw.HTML()
        self._panes = (ipw.HTML(), ipw.HTML())
        for pane in self._panes:
            pane.layout = ipw.Layout(width="48%")
        self.run_button.on_click(self._on_run)
        self.cancel_button.on_click(lambda _: self.cancel())
        self.children = (
            self.prompt,
            ipw.HBox([self.capacity, self.on_miss, self.max_tokens]),
            ipw.HBox([self.run_button, self.cancel_button, self.message]),
            ipw.HBox(list(self._panes), layout=ipw.Layout(width="98%")),
        )
        self.add_class("moelab-live")
        self.observe(self._on_busy, "busy")

    # -- running -----------------------------------------------------------------------------

    def run(self) -> None:
        """Runs both and returns when they are done; an interrupt ends them as Cancel does."""
        try:
            for _ in self._steps():
                pass
        except KeyboardInterrupt:
            self._say("interrupted; the lab is as it was")

    def cancel(self) -> None:
        """Ends the run after the token that is being computed."""
        self._cancelled = True

    def static(self) -> render.Static:
        """Returns the last run as HTML without scripts, which shows itself."""
        panes = "".join(
            f'<div style="display:inline-block;width:48%;vertical-align:top">{html}</div>'
            for html in self._pane_html()
        )
        prompt = escape(str(self.prompt.value))
        return render.Static(
            f'<div><div style="color:{render.MUTED}">{prompt}</div>{panes}'
            f"<div>{self.message.value}</div></div>"
        )

    def _on_run(self, _: Any) -> None:
        if self.busy:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.run()
            return
        self._task = loop.create_task(self._run_between())

    async def _run_between(self) -> None:
        """Runs a token at a time, and lets the kernel hear its messages in between."""
        with contextlib.closing(self._steps()) as steps:
            for _ in steps:
                # Twice: once for the socket to be read, once for what it brought to be handled.
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)

    def _steps(self) -> Generator[None, None, None]:
        """Runs both, yielding after each token; the lab is as it was when this ends, however."""
        self._cancelled, self.busy, self.fork = False, True, None
        action = str(self.on_miss.value)
        self.exact = Side("exact: on a miss, load")
        self.other = Side(f"{action} at {self.capacity.value} experts a layer")
        self._say("")
        lab = self.lab
        before, told = None, ""
        try:
            lab._check_open()
            before = (list(lab.capacities), lab.miss_action, lab.swap_budget, lab.budget)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that of wrong_slot is said below
                lab.resize(int(self.capacity.value))
                for side, chosen in ((self.exact, "load"), (self.other, action)):
                    lab.set_on_miss(chosen)
                    lab.reset()
                    yield from self._one(side)
                    if self._cancelled:
                        break
            self.fork = forks_at(self.exact.tokens, self.other.tokens)
            told = self._verdict(action)
        except MoelabError as error:
            told = f"{type(error).__name__}: {error}"
        except ValueError as error:  # an empty prompt, say
            told = str(error)
        finally:
            try:
                if before is not None:
                    self._restore(*before)
            finally:
                self.busy = False
                self._say(told)  # which is true only now that the lab is as it was
                self._show()

    def _one(self, side: Side) -> Iterator[None]:
        lab = self.lab
        with lab.record() as recording:
            stream = lab.stream(
                str(self.prompt.value),
                int(self.max_tokens.value),
                temperature=self._temperature,
                seed=self._seed,
            )
            with contextlib.closing(stream):  # type: ignore[type-var]
                last = None
                for response in stream:
                    now = time.perf_counter()
                    if last is not None:
                        side.seconds += now - last
                    side.tokens.append(int(response.token))
                    side.text += response.text
                    self._show()
                    yield
                    if self._cancelled:
                        break
                    last = time.perf_counter()  # what the kernel did meanwhile is not counted
        tokens = recording.tokens
        decoded = tokens[(tokens["phase"] == "decode").to_numpy()]
        side.hits = int(decoded["hits"].sum())
        side.routed = side.hits + int(decoded["misses"].sum())
        side.done = not self._cancelled
        self._show()

    def _restore(
        self, capacities: Sequence[int], action: Any, swap_budget: int | None, budget: Any
    ) -> None:
        lab = self.lab
        if lab._closed:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lab.resize(list(capacities))
            lab.set_on_miss(action, swap_budget=swap_budget)
        lab.budget = budget

    # -- drawing -----------------------------------------------------------------------------

    def _on_busy(self, change: Any) -> None:
        for control in (self.prompt, self.capacity, self.on_miss, self.max_tokens, self.run_button):
            control.disabled = change["new"]
        self.cancel_button.disabled = not change["new"]

    def _say(self, text: str) -> None:
        self.message.value = escape(text)

    def _verdict(self, action: str) -> str:
        told = (
            "wrong_slot is a baseline, not a way to run a model. " if action == "wrong_slot" else ""
        )
        if self._cancelled:
            return told + "cancelled; the lab is as it was"
        if self.fork is None:
            return f"{told}the same {len(self.other.tokens)} tokens"
        return f"{told}they part at token {self.fork + 1}"

    def _show(self) -> None:
        for pane, html in zip(self._panes, self._pane_html(), strict=True):
            pane.value = html

    def _pane_html(self) -> tuple[str, str]:
        # The other's text is shown up to where it parts from the exact run's, and from there on.
        fork = forks_at(self.exact.tokens, self.other.tokens) if self.other.tokens else None
        if fork is not None and fork >= len(self.other.tokens):
            fork = None  # it has not come so far
        return self._side_html(self.exact, fork), self._side_html(self.other, fork)

    def _side_html(self, side: Side, fork: int | None) -> str:
        text = side.text
        shared, rest = text, ""
        if fork is not None:
            shared = self.lab.tokenizer.decode(side.tokens[:fork])
            # What a token adds to a text need not be what it is by itself: only if it fits.
            shared = shared if text.startswith(shared) else ""
            rest = text[len(shared) :]
        parted = f'<span style="background:#f6d5d9">{escape(rest)}</span>' if rest else ""
        return (
            f'<div style="margin:4px"><b>{escape(side.name)}</b> '
            f'<span style="color:{render.MUTED}">{escape(side.facts)}</span>'
            f'<div style="{render.MONO};white-space:pre-wrap;color:#000;background:#fff;'
            f'padding:6px;border:1px solid #ddd">{escape(shared)}{parted}</div></div>'
        )


def forks_at(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Returns the place of the first token in which two texts differ; None if they are the same.

    Where one ends and the other goes on, that is where they part.
    """
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return None if len(first) == len(second) else min(len(first), len(second))
