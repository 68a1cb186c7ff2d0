"""Text files to documents, and documents to splits that never change.

A *document* is a file, a page, a problem or a novel. Whole documents are held
out, so that no passage of a held-out text was seen in training. What decides
is a hash of the document's own identity and a fixed seed, not its position:
adding documents to the corpus moves none of the others.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("python", "prose", "math", "spanish", "shell", "guide")
SPLIT_SEED = "moelab-labmodel-1"

#: Documents held out a domain, by split. Novels are long: one gives many excerpts.
HELD_OUT: dict[str, dict[str, int]] = {
    "python": {"test": 32, "selection": 16, "calibration": 16},
    "prose": {"test": 3, "selection": 1, "calibration": 1},
    "math": {"test": 64, "selection": 48, "calibration": 48},
    "spanish": {"test": 32, "selection": 16, "calibration": 16},
    "shell": {"test": 160, "selection": 48, "calibration": 48},
    "guide": {"test": 32, "selection": 16, "calibration": 16},
}

#: Excerpts that ship, a domain and split, and the bytes that one has at most.
EXCERPTS: dict[str, int] = {"test": 64, "selection": 16, "calibration": 16}
EXCERPT_BYTES = 2200

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "encodings",
    "__pycache__",
    "pydoc_data",
}


@dataclass(frozen=True)
class Document:
    """One independent text."""

    domain: str
    """One of `DOMAINS`."""
    key: str
    """What the document is called; documents with the same key share a split."""
    text: str
    """The whole text."""


def load_documents(corpus: Path) -> list[Document]:
    """Read every document of every domain.

    Args:
        corpus: Folder with `prose.jsonl.xz`, `math.jsonl.xz`, `spanish.jsonl.xz`,
            `shell.jsonl.xz` and `guide.jsonl.xz`: one JSON object with `text` a line.

    Returns:
        Documents in a fixed order; Python's standard library comes first.
    """
    documents = list(_standard_library())
    for domain in DOMAINS[1:]:
        path = corpus / f"{domain}.jsonl.xz"
        if not path.exists():
            raise FileNotFoundError(f"the corpus has no {path.name}: looked in {corpus}")
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                text = record["text"].replace("\r\n", "\n").strip("\n") + "\n"
                if len(text) >= 100:
                    documents.append(Document(domain, _key(domain, record, text), text))
    return documents


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Assign whole documents to train, calibration, selection and test.

    Args:
        documents: What `load_documents` returned.

    Returns:
        Split name to its documents. A key (a tldr page exists for several
        systems, for example) is never in two splits.
    """
    splits: dict[str, list[Document]] = {"train": [], **{split: [] for split in EXCERPTS}}
    for domain in DOMAINS:
        members = [d for d in documents if d.domain == domain]
        order = sorted({d.key for d in members if _may_be_held_out(d)}, key=_rank)
        split_of: dict[str, str] = {}
        at = 0
        for split, count in HELD_OUT[domain].items():
            split_of.update(dict.fromkeys(order[at : at + count], split))
            at += count
        for document in members:
            splits[split_of.get(document.key, "train")].append(document)
    return splits


def excerpts(splits: dict[str, list[Document]]) -> list[dict[str, str]]:
    """Cut the held-out excerpts that ship with the package.

    Args:
        splits: What `split_documents` returned.

    Returns:
        Records with `id`, `domain`, `split`, `title` and `text`.
    """
    records = []
    for split, most in EXCERPTS.items():
        for domain in DOMAINS:
            members = _one_per_key([d for d in splits[split] if d.domain == domain])
            # A novel gives many excerpts, every other document one.
            wanted = most // 2 if domain == "prose" and split == "test" else len(members)
            wanted = min(most, max(16, wanted))
            each = -(-wanted // max(1, len(members)))
            cut = [
                {"domain": domain, "split": split, "title": d.key, "text": text}
                for d in members
                for text in _cut(d, each)
            ][:wanted]
            records += [{"id": f"{domain}-{split}-{i:02d}", **r} for i, r in enumerate(cut)]
    return records


def write_jsonl_xz(path: Path, records: list[dict[str, str]]) -> None:
    """Write records, one JSON object a line, xz-compressed."""
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_bytes(lzma.compress(lines.encode(), preset=9))


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= 300:
            yield Document("python", relative.as_posix(), text)


def _key(domain: str, record: dict[str, str], text: str) -> str:
    if "title" in record:
        return record["title"]
    first = text.lstrip().splitlines()[0].strip()
    if domain == "shell":
        return first.lstrip("# ").strip().lower()
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{first.lstrip('# ').removeprefix('Question: ')[:60]} ({digest})"


def _may_be_held_out(document: Document) -> bool:
    """Held-out texts are long enough to measure, and no novel is among the giants."""
    size = len(document.text.encode())
    if document.domain == "prose":
        return 300_000 < size < 1_100_000
    return size >= {"math": 200, "shell": 300}.get(document.domain, 2 * EXCERPT_BYTES)


def _rank(key: str) -> str:
    return hashlib.sha256(f"{SPLIT_SEED}:{key}".encode()).hexdigest()


def _one_per_key(documents: list[Document]) -> list[Document]:
    return list({d.key: d for d in reversed(documents)}.values())[::-1]


def _cut(document: Document, count: int) -> Iterator[str]:
    """Cut `count` passages that begin at a line, spread over the document."""
    lines = document.text.splitlines(keepends=True)
    if len(document.text.encode()) <= EXCERPT_BYTES:
        yield document.text
        return
    rng = random.Random(f"{SPLIT_SEED}:{document.key}")
    for i in range(count):
        low, high = (int(len(lines) * (0.05 + 0.85 * j / count)) for j in (i, i + 1))
        start = rng.randint(low, max(low, high - 1))
        blank = [n for n in range(start, min(start + 60, len(lines))) if not lines[n].strip()]
        passage, size = "", 0
        for line in lines[(blank[0] + 1 if blank else start) :]:
            size += len(line.encode())
            if size > EXCERPT_BYTES and passage:
                break
            passage += line
        encoded = passage.strip("\n").encode()[:EXCERPT_BYTES]
        yield encoded.decode(errors="ignore") + "\n"
