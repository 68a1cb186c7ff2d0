"""The explorer of a recording: tokens and experts, each way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as ipw
import numpy as np
import traitlets

from ..errors import StudyError
from . import render
from .passage import COLOURS, LIMIT, Passage, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = 160
"""Tokens on a page: each is a button, and a browser is slow with thousands."""

HINT = "<i>Pick a token of the text, or a layer and an expert.</i>"
NOBODY = -1
"""The choice of no expert."""


class Explorer(ipw.VBox):
    """A recording's text, coloured; pick a token or an expert.

    What is picked is a trait, so a program can pick and watch as well:
    `explorer.token = 12; explorer.observe(f, "token")`.

    Args:
        recording: A `Recording`, or what has its `tokens` and `routing` frames.
        colour: What the colour of a token stands for: `"hit rate"`, `"missed mass"`, `"surprise"`
            or `"expert's weight"`.
        page_size: Tokens on a page.
        limit: Tokens that are looked at, from the first.

    Attributes:
        token: The token picked, counted from 0; None for none. Setting it turns to its page.
        layer: The layer whose experts can be picked.
        expert: The expert picked, of `layer`; None for none.
        page: The page shown, counted from 0.
        colour: What the colour stands for.

    Raises:
        SchemaError: If a frame lacks a column.
        StudyError: If there is no token.
    """

    token = traitlets.Int(None, allow_none=True)
    layer = traitlets.Int()
    expert = traitlets.Int(None, allow_none=True)
    page = traitlets.Int(0)
    colour = traitlets.Enum(list(COLOURS))

    def __init__(
        self,
        recording: Any,
        *,
        colour: str = "hit rate",
        page_size: int = PAGE,
        limit: int = LIMIT,
    ) -> None:
        if colour not in COLOURS:
            raise StudyError(f"colour must be one of {', '.join(COLOURS)}, got {colour!r}.")
        if page_size < 1:
            raise StudyError(f"page_size must be positive, got {page_size}.")
        self.passage = Passage(recording, limit)
        self.pages = -(-len(self.passage) // page_size)
        self._size = page_size
        self._values: np.ndarray = np.zeros(0)
        self._steps: np.ndarray = np.zeros(0, int)
        self._found = self.passage.tokens_of(-1, -1)
        super().__init__()
        layers = self.passage.layers
        self.set_trait("colour", colour)
        self.set_trait("layer", layers[0] if layers else 0)
        self._make_controls()
        self._make_buttons()
        self._paint()
        self._fill_experts()
        self._turn()
        self._describe()
        self.observe(self._on_pick, ["token", "page", "layer", "expert", "colour"])

    # -- what there is to see without widgets ------------------------------------------------

    def static(self) -> render.Static:
        """Returns the page shown, the picked token's experts and the picked expert's tokens.

        HTML without scripts, which shows itself as a cell's last line.
        """
        first, last = self._span()
        legend, panel = self._legend.value, self._token_panel.value + self._expert_panel.value
        text = render.text_html(
            self.passage.texts[first:last],
            self._steps[first:last],
            titles=[self._title(place) for place in range(first, last)],
            chosen=None if self.token is None else self.token - first,
            marked=self._marked(first, last),
        )
        return render.Static(f"<div>{legend}{text}{panel}</div>")

    def plot_text(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draws the page shown as a picture; see `moelab.plots.coloured_text`."""
        from ..plots.tokens import coloured_text

        first, last = self._span()
        texts = [shown(text) + "\n" * text.count("\n") for text in self.passage.texts[first:last]]
        chosen = None if self.token is None else self.token - first
        return coloured_text(
            texts, self._values[first:last], label=self._meaning(), chosen=chosen,
            marked=sorted(self._marked(first, last)), ax=ax, **options,
        )  # fmt: skip

    def plot_token(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draws the experts of the picked token; see `moelab.plots.token_experts`.

        Raises:
            StudyError: If no token is picked.
        """
        from ..plots.tokens import token_experts

        if self.token is None:
            raise StudyError("No token is picked: set explorer.token first.")
        title = f"Experts of “{shown(self.passage.texts[self.token])}”"
        return token_experts(self.passage.slots(self.token), title=title, ax=ax, **options)

    # -- validation --------------------------------------------------------------------------

    @traitlets.validate("token")
    def _valid_token(self, proposal: Any) -> int | None:
        value: int | None = proposal["value"]
        if value is not None and not 0 <= value < len(self.passage):
            raise traitlets.TraitError(
                f"token must be from 0 to {len(self.passage) - 1}, got {value}."
            )
        return value

    @traitlets.validate("page")
    def _valid_page(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < self.pages:
            raise traitlets.TraitError(
                f"page must be from 0 to {self.pages - 1}, got {proposal['value']}."
            )
        return int(proposal["value"])

    @traitlets.validate("layer")
    def _valid_layer(self, proposal: Any) -> int:
        if self.passage.layers and proposal["value"] not in self.passage.layers:
            raise traitlets.TraitError(
                f"layer must be one of {self.passage.layers}, got {proposal['value']}."
            )
        return int(proposal["value"])

    # -- parts -------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        auto = ipw.Layout(width="auto")
        self.colour_by = ipw.Dropdown(
            options=list(COLOURS), value=self.colour, description="colour", layout=auto
        )
        ipw.link((self, "colour"), (self.colour_by, "value"))
        self.back = ipw.Button(description="◀", tooltip="page before", layout=auto)
        self.forth = ipw.Button(description="▶", tooltip="next page", layout=auto)
        self._place = ipw.Label()
        self.back.on_click(lambda _: self._step(-1))
        self.forth.on_click(lambda _: self._step(1))
        self.layer_box = ipw.Dropdown(
            options=self.passage.layers or [0], value=self.layer, description="layer", layout=auto
        )
        ipw.link((self, "layer"), (self.layer_box, "value"))
        self.expert_box = ipw.Dropdown(
            options=[("none", NOBODY)], value=NOBODY, description="expert", layout=auto
        )
        self.expert_box.observe(self._on_expert_box, "value")
        self.onward = ipw.Button(
            description="next page with it", tooltip="next page with a token of this expert",
            layout=auto, disabled=True,
        )  # fmt: skip
        self.onward.on_click(lambda _: self._seek())
        self._legend = ipw.HTML()
        self._token_panel = ipw.HTML(HINT)
        self._expert_panel = ipw.HTML()
        self.shortcuts = ipw.HBox(layout=ipw.Layout(flex_flow="row wrap"))
        self._text = ipw.Box(
            layout=ipw.Layout(flex_flow="row wrap", align_items="center", padding="4px 0")
        )
        pages = [self.back, self._place, self.forth] if self.pages > 1 else [self._place]
        self.children = (
            ipw.HBox([self.colour_by, *pages], layout=ipw.Layout(flex_flow="row wrap")),
            self._legend,
            self._text,
            ipw.HBox(
                [self.layer_box, self.expert_box, self.onward],
                layout=ipw.Layout(flex_flow="row wrap"),
            ),
            ipw.HBox(
                [ipw.VBox([self._token_panel, self.shortcuts]), self._expert_panel],
                layout=ipw.Layout(flex_flow="row wrap", grid_gap="24px"),
            ),
        )
        self.add_class("moelab-explorer")

    def _make_buttons(self) -> None:
        # Styles and layouts are shared: a page is a few of them, not three models a token.
        font = {"font_family": "monospace", "font_size": "13px"}
        self._shades = [
            ipw.ButtonStyle(button_color=ground, text_color=ink, **font)
            for ground, ink in render.palette()
        ]
        self._plain = ipw.ButtonStyle(button_color="#ffffff", text_color=render.MUTED, **font)
        base = {"width": "auto", "height": "22px", "padding": "0", "margin": "1px 0",
                "min_width": "0"}  # fmt: skip
        frame, line = f"2px solid {render.CHOSEN}", f"3px solid {render.CHOSEN}"
        self._layouts = {
            (False, False): ipw.Layout(**base),
            (False, True): ipw.Layout(**base, border_bottom=line),
            (True, False): ipw.Layout(**{**base, "height": "26px"}, border=frame),
            (True, True): ipw.Layout(
                **{**base, "height": "27px"},
                border_top=frame,
                border_left=frame,
                border_right=frame,
                border_bottom=line,
            ),
        }
        self._end = ipw.Box(layout=ipw.Layout(width="100%", height="0"))
        self.buttons = []
        for place in range(min(self._size, len(self.passage))):
            button = ipw.Button(style=self._plain, layout=self._layouts[False, False])
            button.on_click(lambda _, place=place: self._pick(place))
            self.buttons.append(button)

    # -- changes -----------------------------------------------------------------------------

    def _on_pick(self, change: Any) -> None:
        name = change["name"]
        if name == "layer":
            self._fill_experts()
            if self.expert is not None:
                self.expert = None
            self._describe()
            return
        if name == "expert":
            self._found = self.passage.tokens_of(
                self.layer, NOBODY if self.expert is None else self.expert
            )
            known = {value for _, value in self.expert_box.options}
            wanted = NOBODY if self.expert is None else self.expert
            if wanted not in known:
                self.expert_box.options = [*self.expert_box.options, (f"{wanted} (0)", wanted)]
            self.expert_box.value = wanted
            self.onward.disabled = self._found.empty or self.pages == 1
        if name == "token" and self.token is not None and self.token // self._size != self.page:
            self.page = self.token // self._size  # which draws the page
        elif name == "token":
            self._mark()
        elif name == "page":
            self._turn()
        else:
            self._paint()
            self._turn()
        self._describe()

    def _on_expert_box(self, change: Any) -> None:
        self.expert = None if change["new"] in (None, NOBODY) else int(change["new"])

    def _pick(self, place: int) -> None:
        token = self.page * self._size + place
        if token < len(self.passage):
            self.token = token

    def _step(self, pages: int) -> None:
        self.page = min(max(self.page + pages, 0), self.pages - 1)

    def _seek(self) -> None:
        """Turns to the next page that has a token of the picked expert, from the start again."""
        pages = np.unique(self._found["token"].to_numpy() // self._size)
        if len(pages):
            later = pages[pages > self.page]
            self.page = int(later[0] if len(later) else pages[0])

    # -- drawing -----------------------------------------------------------------------------

    def _span(self) -> tuple[int, int]:
        first = self.page * self._size
        return first, min(first + self._size, len(self.passage))

    def _marked(self, first: int, last: int) -> set[int]:
        found = self._found["token"].to_numpy()
        return set((found[(found >= first) & (found < last)] - first).tolist())

    def _meaning(self) -> str:
        if self.colour == "expert's weight":
            return (
                "pick an expert to see its weight"
                if self.expert is None
                else f"gate weight of expert {self.expert} of layer {self.layer}"
            )
        return COLOURS[self.colour]

    def _title(self, token: int) -> str:
        value = self._values[token]
        told = "none" if np.isnan(value) else f"{value:.3g}"
        return f"{self.passage.where(token)}; {self.colour}: {told}"

    def _paint(self) -> None:
        """Finds every token's colour: the scale is that of the whole text, not of a page."""
        self._values = self.passage.values(self.colour, self.layer, self.expert)
        self._steps, ends = render.shades(self._values)
        share = self.colour in ("hit rate", "missed mass")
        self._legend.value = render.legend_html(self._meaning(), ends, share=share)

    def _turn(self) -> None:
        """Shows a page."""
        first, last = self._span()
        children = []
        for place, token in enumerate(range(first, last)):
            button, text = self.buttons[place], self.passage.texts[token]
            step = int(self._steps[token])
            with button.hold_sync():
                # A browser would drop spaces at the ends of a button's text.
                button.description = shown(text).replace(" ", "\u00a0")
                button.tooltip = self._title(token)
                button.style = self._shades[step] if step >= 0 else self._plain
            children.append(button)
            if "\n" in text:
                children.append(self._end)
        self._mark()
        self._text.children = children
        more = self.passage.total - len(self.passage)
        left_out = f"; {more:,} more are left out" if more else ""
        self._place.value = f"tokens {first + 1:,}–{last:,} of {len(self.passage):,}{left_out}"
        self.back.disabled, self.forth.disabled = self.page == 0, self.page == self.pages - 1

    def _mark(self) -> None:
        first, last = self._span()
        marked = self._marked(first, last)
        for place in range(last - first):
            layout = self._layouts[first + place == self.token, place in marked]
            if self.buttons[place].layout is not layout:
                self.buttons[place].layout = layout

    def _fill_experts(self) -> None:
        uses = self.passage.uses(self.layer)
        options = [(f"{expert} ({count:,} tokens)", int(expert)) for expert, count in uses.items()]
        # Without the callback: that the list is another says nothing of what is picked.
        self.expert_box.unobserve(self._on_expert_box, "value")
        self.expert_box.options = [("none", NOBODY), *options]
        self.expert_box.value = NOBODY
        self.expert_box.observe(self._on_expert_box, "value")

    def _describe(self) -> None:
        """Fills the panels."""
        if self.token is None:
            self._token_panel.value = HINT
            self.shortcuts.children = ()
        else:
            slots = self.passage.slots(self.token)
            row = self.passage.tokens.iloc[self.token]
            facts = f"; {row['hits']} hits, {row['misses']} misses"
            if "logprob" in row and np.isfinite(row["logprob"]):
                facts += f", log-probability {row['logprob']:.2f}"
            self._token_panel.value = render.token_html(
                self.passage.where(self.token), self.passage.texts[self.token], slots, facts
            )
            here = slots.loc[slots["layer"] == self.layer, "expert"]
            self.shortcuts.children = (
                ipw.Label(f"its experts of layer {self.layer}:"),
                *(self._shortcut(int(expert)) for expert in here),
            )
        if self.expert is None:
            self._expert_panel.value = ""
        else:
            self._expert_panel.value = render.expert_html(
                self.layer, self.expert, self._found, len(self.passage)
            )

    def _shortcut(self, expert: int) -> ipw.Button:
        button = ipw.Button(
            description=str(expert), tooltip=f"see the tokens of expert {expert}",
            layout=ipw.Layout(width="auto", height="22px", padding="0 6px"),
        )  # fmt: skip
        button.on_click(lambda _: setattr(self, "expert", expert))
        return button
