"""The code that trained the lab model: documents, pairs, figures, and the PyTorch twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moelab.labmodel.training import chat, data, routing
from moelab.labmodel.training.asking import is_right

PAGE = """# tar create

> Archiving utility.
> More information: <https://example.org>.

- Create an archive from files:

`tar {{[-c|--create]}} --file {{path/to/target.tar}} {{path/to/file1 path/to/file2 ...}}`

- [l]ist an archive:

`tar --list --file {{source.tar}}`
"""


def documents() -> list[data.Document]:
    return [data.Document("guide", f"page {i % 90}", f"Text {i}.\n" * 800) for i in range(100)] + [
        data.Document("prose", f"novel {i}", "A line.\n" * 60_000) for i in range(9)
    ]


def test_splits_hold_out_whole_keys() -> None:
    splits = data.split_documents(documents())
    keys = {name: {d.key for d in members} for name, members in splits.items()}
    for name, held in keys.items():
        assert all(not held & others for n, others in keys.items() if n != name)
    assert len(keys["test"]) == 32 + 3
    assert sum(map(len, splits.values())) == 109


def test_splits_do_not_move_when_documents_are_reordered() -> None:
    before = data.split_documents(documents())
    after = data.split_documents(documents()[::-1])
    for name in before:
        assert {d.key for d in before[name]} == {d.key for d in after[name]}


def test_excerpts_are_short_and_whole_characters() -> None:
    for record in data.excerpts(data.split_documents(documents())):
        assert 0 < len(record["text"].encode()) <= data.EXCERPT_BYTES + 1


def test_examples_of_a_page() -> None:
    create, listing = chat.examples(data.Document("shell", "tar create", PAGE))
    assert create.title == "tar create"
    assert create.what == "create an archive from files"
    assert create.command == (
        "tar --create --file path/to/target.tar path/to/file1 path/to/file2 ..."
    )
    assert create.about == "Archiving utility."
    assert listing.what == "list an archive"


def test_pairs_of_a_function() -> None:
    source = 'def twice(x):\n    """Return two times x."""\n    y = 2 * x\n    return y\n'
    (pair,) = chat.pairs([data.Document("python", "a.py", source)])["chat_python"]
    assert "Return two times x." in pair
    assert f"```python\n{source}```" in pair


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Run `tar --list`.", True),
        ("Run `sudo tar --list`.", True),
        ("Run tar --list.", False),
        ("Run `gtar`, not `tar`.", False),
        ("`sudo`", False),
    ],
)
def test_is_right(answer: str, right: bool) -> None:
    assert is_right(answer, "tar") is right
    assert not is_right(answer, "tar create")


def test_jensen_shannon() -> None:
    p, q = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert routing.jensen_shannon(p, q) == pytest.approx(1)
    assert routing.jensen_shannon(p, p) == pytest.approx(0)


def test_divergence_of_equal_and_of_different_domains() -> None:
    rng = np.random.default_rng(0)
    even = np.ones(16) / 16
    skewed = np.linspace(1, 9, 16) / 80
    same = {d: rng.multinomial(4000, even, (20, 2)) for d in ("a", "b")}
    other = {"a": same["a"], "b": rng.multinomial(4000, skewed, (20, 2))}
    assert routing.divergence(same)["least_ratio"] < 3
    assert routing.divergence(other)["least_ratio"] > 50


def test_fake_quantisation_is_what_mlx_stores() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (moelab[train])")
    import mlx.core as mx

    from moelab.labmodel.training.quantisation import fake_quantise, quantised

    torch.manual_seed(0)
    cases = [torch.randn(64, 128), torch.rand(8, 128) + 0.1, -torch.rand(8, 128)]
    weight = torch.cat([*cases, torch.zeros(1, 128), torch.ones(1, 128), 1e-5 * cases[0]])
    for bits in (4, 8):
        stored = mx.quantize(mx.array(weight.numpy()), 64, bits)
        read = np.array(mx.dequantize(*stored, 64, bits))
        np.testing.assert_array_equal(quantised(weight, bits).numpy(), read)
    weight.requires_grad_()
    fake_quantise(weight).sum().backward()
    assert (weight.grad == 1).all()


def test_the_twin_agrees_with_transformers_and_mlx(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (moelab[train])")
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    from moelab import labmodel
    from moelab.labmodel.training.export import write_float_folder
    from moelab.labmodel.training.model import LabModel
    from moelab.labmodel.training.settings import Architecture

    torch.manual_seed(0)
    sizes = Architecture(hidden_size=64, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2)
    twin = LabModel(sizes).eval()
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    write_float_folder(twin.state_dict(), sizes, labmodel.path(), tmp_path)
    ids = torch.randint(0, sizes.vocab_size, (1, 100))
    with torch.no_grad():
        ours = twin(ids)[0].numpy()
        hugging = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
        theirs = hugging(ids).logits.numpy()
    model, _ = load_model(tmp_path)
    assert np.abs(ours).max() > 0.5
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(ours - np.array(model(mx.array(ids.numpy())))).max() < 1e-3


def test_a_run_resumes(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed (moelab[train])")
    from moelab.labmodel.training.settings import Architecture, Settings
    from moelab.labmodel.training.train import Trainer

    _write_tiny_corpus(tmp_path)
    sizes = Architecture(
        vocab_size=64, hidden_size=64, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2
    )
    settings = Settings(steps=4, sequences=2, length=64, evaluate_every=0.5)
    first = Trainer(tmp_path, settings, "cpu", sizes)
    first.run()
    again = Trainer(tmp_path, settings, "cpu", sizes)
    assert (again.step, again.log) == (4, first.log)
    assert (first.batches.batch(7, 2) == again.batches.batch(7, 2)).all()
    assert [r["quantised"] for r in first.log][-1]


def _write_tiny_corpus(folder: Path) -> None:
    from moelab.labmodel.training.batches import MIXTURE

    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"newline": np.arange(64) == 10}
    for source in MIXTURE:
        arrays[f"{source}/tokens"] = rng.integers(3, 64, 5000).astype(np.uint16)
        arrays[f"{source}/ends"] = np.array([800, 900, 5000])
    np.savez(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]
    held = {f"{d}/ids": rng.integers(3, 64, (1, 40)) for d in data.DOMAINS}
    held |= {f"{d}/bytes": np.array(100) for d in data.DOMAINS}
    np.savez(folder / "selection.npz", **held)  # type: ignore[arg-type]
