"""`moelab.record_texts`: the full model's routing of texts, with each text's name and domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..display import facts_html, facts_text
from ..prompt_texts import Prompts
from .divergence import REFERENCE
from .judge import exactly, passes, run_prefix
from .window import documents_of, few_of_each, windows_of

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab
    from ..routing.recording import Recording

EACH = 4
"""Shipped texts of each domain, where none are given."""


@dataclass(frozen=True, eq=False, repr=False)
class RecordedTexts:
    """A recording of several texts, one a run.

    Attributes:
        recording: The recording; run `i` is of the i-th text. It takes `moelab.curves`,
            `moelab.replay` and `moelab.policy_table` (with `documents=`).
        documents: A row a text: `run` (int64), `document`, `domain`.
    """

    recording: Recording
    documents: pd.DataFrame

    @cached_property
    def routing(self) -> pd.DataFrame:
        """`recording.routing` with `document` and `domain`, as `moelab.metrics` take it."""
        from ..routing.metrics import labelled

        names = self.documents.set_index("run")
        return labelled(
            self.recording, names["domain"].to_dict(), documents=names["document"].to_dict()
        )

    @property
    def tokens(self) -> pd.DataFrame:
        """`recording.tokens`."""
        return self.recording.tokens

    def export(self, path: Any, **about: Any) -> Any:
        """Writes a trace that others can read; see `moelab.export_trace`."""
        from ..routing.trace_writing import export_trace

        return export_trace(self.recording, path, documents=self.documents, **about)

    def _facts(self) -> dict[str, str]:
        tokens = self.recording.tokens["phase"].value_counts()
        counts = ", ".join(f"{n} {phase}" for phase, n in tokens.items() if n)
        return {
            "model": str(self.recording.run["model"]),
            "texts": f"{len(self.documents)} in {self.documents['domain'].nunique()} domains",
            "tokens": counts,
        }

    def __repr__(self) -> str:
        return facts_text("RecordedTexts", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("RecordedTexts", self._facts())


def record_texts(
    lab: Lab,
    texts: Prompts = None,
    *,
    split: str = "test",
    prefix: int = 48,
    tokens: int = 80,
    progress: bool = True,
) -> RecordedTexts:
    """Records the full model's routing while it reads texts, each from an empty cache.

    The first `prefix` tokens of a text are one step, as a prompt is; the others are a step each,
    as in decoding, so that what is recorded can be replayed for both. Routing is the full model's
    whatever the lab's capacity and miss action. Nothing is generated: a trace of it is
    "teacher-forced".

    Args:
        lab: The model. Afterwards it has its own miss action, and its bank its initial contents.
        texts: As in `moelab.compare`. None takes four texts a domain of a shipped split.
        split: "calibration", "selection" or "test"; for None only.
        prefix: Tokens of each text in its first step.
        tokens: Tokens after them, one a step.
        progress: Show a progress bar.

    Returns:
        The recording with the texts' names.

    Raises:
        StudyError: If there is no text, or one is too short (named).
        MoelabError: While the lab is being recorded.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    documents, _ = documents_of(texts, split=split)
    # A window's last token is judged and never fed.
    if texts is None:
        documents = few_of_each(lab.tokenizer, documents, least=prefix + tokens + 1, each=EACH)
    cut: Any = documents
    windows = windows_of(lab.tokenizer, cut, prefix=prefix, tokens=tokens)
    with exactly(lab), lab.record() as recording:
        for window in tqdm(windows, "record", unit="text", disable=not progress, leave=False):
            cache = run_prefix(lab.model, window)
            for _ in passes(lab.model, window, cache, None, REFERENCE, lambda *_: None):
                pass
    names = pd.DataFrame(
        {
            "run": range(len(windows)),
            "document": [w.document for w in windows],
            "domain": [w.domain for w in windows],
        }
    )
    return RecordedTexts(recording, names)
