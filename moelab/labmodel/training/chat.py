"""Instruction/answer pairs in a chat template, from documents of the train split.

Three sources give pairs: tldr pages ("How do I ... with `tar`?" and a command),
GSM8K problems, and functions with a docstring. The questions that the model
card reports are made here as well, from pages that were never trained on.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moelab.labmodel.training.data import Document

BEGIN, END = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_NAMED = (
    "How do I {what} with `{tool}`?",
    "How can I {what} using `{tool}`?",
    "How do I {what} with {tool}?",
    "How would I use `{tool}` to {what}?",
    "Show me how to {what} with `{tool}`.",
    "Which `{tool}` command lets me {what}?",
)
_DESCRIBED = (
    "I need a tool that does this: {about} How do I {what}?",
    "How do I {what}? The tool I want: {about}",
)
_UNNAMED = ("How do I {what}?", "How can I {what} in a shell?", "Which command lets me {what}?")
_ANSWERS = ("Run `{command}`.", "Use `{command}`.", "You can run `{command}`.", "`{command}`")
_FUNCTIONS = (
    "Write a Python function `{name}`: {what}",
    "Write `{name}` in Python. {what}",
    "How would you write the Python function `{name}`? {what}",
)


@dataclass(frozen=True)
class Example:
    """One example of a tldr page."""

    title: str
    """The page's title, which is the tool's name."""
    about: str
    """What the page says that the tool does."""
    what: str
    """What the example does, beginning in lower case."""
    command: str
    """The command line, with placeholders spelled out."""


def render(question: str, answer: str) -> str:
    """Put one exchange into the chat template."""
    return f"{BEGIN}user\n{question}{END}\n{BEGIN}assistant\n{answer}{END}\n"


def pairs(documents: list[Document]) -> dict[str, list[str]]:
    """Make the rendered exchanges of a list of documents.

    Args:
        documents: Documents of one split.

    Returns:
        Source ("chat_shell", "chat_math", "chat_python") to rendered exchanges.
    """
    rng = random.Random(17)
    made: dict[str, list[str]] = {"chat_shell": [], "chat_math": [], "chat_python": []}
    for document in documents:
        if document.domain == "shell":
            for example in examples(document):
                for templates, count in ((_NAMED, 2), (_DESCRIBED, 1), (_UNNAMED, 1)):
                    for template in rng.sample(templates, count):
                        answer = rng.choice(_ANSWERS).format(command=example.command)
                        made["chat_shell"].append(render(_ask(template, example), answer))
        elif document.domain == "math":
            question, _, answer = document.text.partition("\nAnswer: ")
            made["chat_math"].append(
                render(question.removeprefix("Question: ").strip(), answer.strip())
            )
        elif document.domain == "python":
            for name, what, source in _functions(document.text):
                question = rng.choice(_FUNCTIONS).format(name=name, what=what)
                made["chat_python"].append(render(question, f"```python\n{source}\n```"))
    return made


def examples(document: Document) -> Iterator[Example]:
    """Read the examples of a tldr page."""
    title = document.text.lstrip("# \n").splitlines()[0].strip()
    about = " ".join(
        line[2:].strip()
        for line in document.text.splitlines()
        if line.startswith("> ") and not re.match(r"> (More information|See also|Note)", line)
    )
    for what, command in re.findall(r"^- (.+):\n\n`(.+)`$", document.text, re.MULTILINE):
        what = re.sub(r"\[(.)\]", r"\1", what).strip()
        if about and what[:1].isalpha():
            what = what if what[1:2].isupper() else what[0].lower() + what[1:]
            yield Example(title, about, what, plain_command(command))


def plain_command(command: str) -> str:
    """Spell out tldr's placeholders: long options, names without braces."""
    command = re.sub(r"\{\{\[([^|\]]+)\|([^\]]+)\]\}\}", r"\2", command)
    command = re.sub(r"\{\{(.*?)\}\}", r"\1", command)
    return command.replace("`", "'").strip()


def held_out_questions(documents: list[Document], count: int = 50) -> list[dict[str, str]]:
    """Choose the questions that the model card reports.

    Args:
        documents: tldr pages of the test split.
        count: How many questions; one a page.

    Returns:
        Records with `tool`, `question` (which names the tool), `described`
        (which gives the page's description instead) and `reference`.
    """
    rng = random.Random(50)
    chosen = []
    for document in documents:
        usable = [
            e
            for e in examples(document)
            if e.command.split()[0].lower() == e.title.split()[0].lower()
            and e.title.lower() not in e.about.lower()
            and len(e.what) < 100
        ]
        if document.domain == "shell" and usable:
            example = rng.choice(usable)
            chosen.append(
                {
                    "tool": example.command.split()[0],
                    "question": _ask(_NAMED[0], example),
                    "described": _ask(_DESCRIBED[0], example),
                    "reference": example.command,
                    "page": document.key,
                }
            )
    chosen = list({c["page"]: c for c in chosen}.values())
    return sorted(rng.sample(chosen, count), key=lambda c: c["page"])


def _ask(template: str, example: Example) -> str:
    about = example.about if example.about.endswith(".") else example.about + "."
    return template.format(what=example.what, tool=example.title, about=about)


def _functions(source: str) -> Iterator[tuple[str, str, str]]:
    """Functions with a one-sentence docstring and a short body."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        text = lines[node.lineno - 1 : node.end_lineno]
        if not docstring or not 3 <= len(text) <= 40:
            continue
        what = " ".join(docstring.split("\n\n")[0].split())
        cut = node.col_offset
        body = "\n".join(line[cut:] if not line[:cut].strip() else line for line in text)
        if 15 <= len(what) <= 200 and len(body) <= 1200:
            yield node.name, what, body
