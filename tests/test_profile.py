"""Profiles: counted as an independent count over stock mlx-lm's routing says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.sample_utils import make_sampler

import moelab
from moelab import cli, labmodel
from moelab.errors import ProfileError
from moelab.experts.profile import Profile
from moelab.experts.tally import Tally
from moelab.prompt_texts import texts_of, windows
from tests.support import stock, tiny

TOKENS = 7
TEXTS: list[Any] = [
    {"text": "the router sends each token to a few of the experts", "domain": "router"},
    {"text": "0123456789 + 9876543210 = 11111111100", "domain": "sums"},
    {"text": "an expert that is not in memory is read from its shard", "domain": "router"},
    {"text": "tiny"},
]


def asked_of_stock(
    path: Path,
    prompts: list[list[int]],
    decode: int,
    monkeypatch: pytest.MonkeyPatch,
    options: Any = dict,
    ends: Collection[int] | None = None,
) -> list[list[tuple[str, int, np.ndarray]]]:
    """For each prompt: phase, layer and ids (tokens, top-k) of each call of a stock switch."""
    model, tokenizer = stock.stock(path)
    layers = tiny.moe_layers(json.loads((path / "config.json").read_text())["model_type"])
    calls: list[np.ndarray] = []
    own = SwitchGLU.__call__

    def noting(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        calls.append(np.array(indices).reshape(-1, indices.shape[-1]))
        return own(self, x, indices)

    never = tokenizer.eos_token_ids if ends is None else ends
    is_end = mx.array([token in never for token in range(tiny.VOCAB)])

    def no_end(_: mx.array, logits: mx.array) -> mx.array:
        return mx.where(is_end, -mx.inf, logits)

    found = []
    with monkeypatch.context() as patch:
        patch.setattr(SwitchGLU, "__call__", noting)
        for prompt in prompts:
            calls.clear()
            for _ in generate_step(
                mx.array(prompt), model, max_tokens=decode, logits_processors=[no_end], **options()
            ):
                pass
            tokens, events = 0, []
            for i, ids in enumerate(calls):
                phase = "prefill" if tokens < len(prompt) else "decode"
                events.append((phase, layers[i % len(layers)], ids))
                tokens += len(ids) if i % len(layers) == len(layers) - 1 else 0
            assert tokens == len(prompt) + decode
            found.append(events)
    return found


def cut(path: Path, texts: list[Any], tokens: int) -> list[tuple[str, list[int]]]:
    """Domain and tokens of every whole stretch of every text."""
    tokenizer = stock.stock(path)[1]
    found = []
    for text in texts:
        ids = tokenizer.encode(text["text"])
        while len(ids) >= tokens:
            found.append((text.get("domain", "all"), ids[:tokens]))
            ids = ids[tokens:]
    return found


def agrees(profile: Profile, domains: list[str], events: Any) -> None:
    """A profile is what plain counting of a stock model's calls gives."""
    slots: Counter[tuple[str, str, int, int]] = Counter()
    prompts: Counter[tuple[str, str, int, int]] = Counter()
    active: Counter[tuple[int, int]] = Counter()
    for domain, calls in zip(domains, events, strict=True):
        used = [(phase, layer, int(e)) for phase, layer, ids in calls for e in ids.ravel()]
        slots.update((domain, *one) for one in used)
        prompts.update((domain, *one) for one in set(used))
        active.update({(layer, expert) for _, layer, expert in used})
    usage = profile.usage
    rows = usage.set_index(["domain", "phase", "layer", "expert"])
    assert rows.index.is_unique
    assert rows["count"].to_dict() == {key: slots[key] for key in rows.index}
    assert rows["prompts"].to_dict() == {key: prompts[key] for key in rows.index}
    assert set(slots) <= set(rows.index)
    assert profile.num_prompts == len(domains)
    assert {
        (layer, expert): n
        for layer in profile.layers
        for expert, n in enumerate(profile.activations[layer].tolist())
        if n
    } == dict(active)
    for (domain, phase, _), group in usage.groupby(["domain", "phase", "layer"], observed=True):
        n = domains.count(domain)
        tokens = n * profile.phase_tokens[phase]
        np.testing.assert_allclose(group["share"], group["count"] / tokens)
        np.testing.assert_allclose(group["prompt_share"], group["prompts"] / n)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_are_those_of_stock_routing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stock.folder(family)
    prompts = cut(path, TEXTS, TOKENS)
    assert len({domain for domain, _ in prompts}) == 2, "the third is too short"
    events = asked_of_stock(path, [ids for _, ids in prompts], 0, monkeypatch)
    _, top_k = tiny.experts(family)
    profile = moelab.profile(path, TEXTS, tokens=TOKENS, capacity=top_k, progress=False)
    agrees(profile, [domain for domain, _ in prompts], events)
    assert profile.provenance["texts_too_short"] == 1
    assert profile.domains == Counter(domain for domain, _ in prompts)
    assert not profile.predicted
    usage = profile.usage
    experts = tiny.experts(family)[0]
    assert usage["uniform_share"].unique() == pytest.approx([top_k / experts])
    chance = 1 - (1 - top_k / experts) ** TOKENS
    assert usage["uniform_prompt_share"].unique() == pytest.approx([chance])
    assert set(usage["phase"]) == {"prefill"}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generated_tokens_are_counted_apart(
    temperature: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"do_sample": temperature > 0, "temperature": temperature, "top_p": 0.9}
    path = tiny.build(tmp_path / "x", "qwen3_moe", generation_config=config)
    # So drawn to the end of the text that it would stop at once if it might.
    prompts = cut(path, TEXTS, TOKENS)

    def options() -> dict[str, Any]:
        mx.random.seed(0)
        return {"sampler": make_sampler(temp=temperature, top_p=0.9 if temperature else 1.0)}

    events = asked_of_stock(path, [ids for _, ids in prompts], 5, monkeypatch, options)
    profile = moelab.profile(
        path, TEXTS, tokens=TOKENS, decode_tokens=5, capacity=4, progress=False
    )
    agrees(profile, [domain for domain, _ in prompts], events)
    assert profile.phase_tokens == {"prefill": TOKENS, "decode": 5}
    assert profile.prompt_tokens == TOKENS + 5
    assert set(profile.usage["phase"]) == {"prefill", "decode"}


def test_no_answer_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the likeliest token is the end of the text, the next likeliest is taken."""
    path = stock.folder("olmoe")
    prompts = cut(path, TEXTS, TOKENS)
    with moelab.load(path, 4) as lab:
        likely = {next(generate_step(mx.array(ids), lab.model))[0] for _, ids in prompts}
        monkeypatch.setattr(lab.tokenizer, "_eos_token_ids", likely)
        assert lab.tokenizer.eos_token_ids == likely
        profile = moelab.profile(lab, TEXTS, tokens=TOKENS, decode_tokens=4, progress=False)
        assert lab.sessions == []
        assert len(lab.generate("the lab is still open", 2)) > 0
    ids = [ids for _, ids in prompts]
    events = asked_of_stock(path, ids, 4, monkeypatch, ends=likely)
    domains = [domain for domain, _ in prompts]
    agrees(profile, domains, events)
    with pytest.raises(AssertionError):
        agrees(profile, domains, asked_of_stock(path, ids, 4, monkeypatch, ends=()))


def same(a: Profile, b: Profile) -> bool:
    """Whether two profiles say the same of the model."""
    return (
        a.usage.equals(b.usage)
        and (a.model, a.fingerprint, a.num_prompts) == (b.model, b.fingerprint, b.num_prompts)
        and (a.experts, a.top_k) == (b.experts, b.top_k)
        and (a.prompt_tokens, a.phase_tokens) == (b.prompt_tokens, b.phase_tokens)
        and list(a.activations) == list(b.activations)
        and all(np.array_equal(a.activations[i], b.activations[i]) for i in a.layers)
    )


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_profile_does_not_depend_on_capacity(family: str) -> None:
    profiles = [
        moelab.profile(stock.folder(family), TEXTS, tokens=TOKENS, capacity=c, progress=False)
        for c in tiny.capacities(family)
    ]
    assert len(profiles) == 4
    assert all(same(profiles[0], other) for other in profiles[1:])


def test_mass_is_the_weights_that_were_recorded() -> None:
    path = stock.folder("deepseek_v3")
    with moelab.load(path, 4) as lab:
        profile = moelab.profile(lab, TEXTS, tokens=TOKENS, progress=False)
        expected: Counter[tuple[int, int]] = Counter()
        for _, ids in cut(path, TEXTS, TOKENS):
            with lab.record() as rec:
                for _ in generate_step(mx.array(ids), lab.model, max_tokens=0):
                    pass
            for row in rec.routing.itertuples():
                expected[row.layer, row.expert] += row.weight
    found = profile.usage.groupby(["layer", "expert"])["mass"].sum()
    for key, mass in found.items():
        assert mass == pytest.approx(expected[key], rel=1e-5, abs=1e-9)
    shares = profile.usage.groupby(["domain", "layer"], observed=True)["mass_share"].sum()
    np.testing.assert_allclose(shares, 1)


def test_one_prompt_recorded_is_the_same_profile() -> None:
    path = stock.folder("gpt_oss")
    ids = cut(path, TEXTS, 20)[0][1]
    with moelab.load(path, 6) as lab:
        text = [{"text": lab.tokenizer.decode(ids), "domain": "d"}]
        made = moelab.profile(lab, text, tokens=20, progress=False)
        with lab.record() as rec:
            for _ in generate_step(mx.array(ids), lab.model, max_tokens=0):
                pass
        assert same(Profile.from_recording(rec, tokens=20, domain="d"), made)
        halves = Profile.from_recording(rec, tokens=9)
        assert halves.num_prompts == 2, "two tokens are left over"
        assert halves.usage["count"].sum() == 20 * 2 * 4, "and count"
        with pytest.raises(ProfileError, match="as long as a prompt of 21 tokens"):
            Profile.from_recording(rec, tokens=21)
        rec.run["on_miss"] = "drop"
        with pytest.raises(ProfileError, match="on_miss='drop'"):
            Profile.from_recording(rec)
        with lab.record() as empty:
            pass
        with pytest.raises(ProfileError, match="Nothing that was recorded"):
            Profile.from_recording(empty)


# -- adding up frames ------------------------------------------------------------------------

LAYERS, EXPERTS = (1, 3), (4, 6)
Token = tuple[int, int, str]
PHASES = ("padding", "prefill", "decode")


def frames(tokens: list[Token], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Frames as a recording has them; each token is a step of its own, some slots weigh nothing."""
    rng = np.random.default_rng(seed)
    rows, slots = [], []
    for step, (run, sequence, phase) in enumerate(tokens):
        key = {"run": run, "sequence": sequence, "step": step, "position": step % 3, "phase": phase}
        rows.append(key)
        for layer, experts in zip(LAYERS, EXPERTS, strict=True):
            chosen = rng.choice(experts, 2, replace=False)
            for expert in chosen[: rng.integers(1, 3)]:
                slots.append({**key, "layer": layer, "expert": expert, "weight": rng.random()})
    keys = ["run", "sequence", "step", "position", "phase"]
    tokens_frame = pd.DataFrame(rows, columns=keys)
    routing = pd.DataFrame(slots, columns=[*keys, "layer", "expert", "weight"])
    for name in ("run", "sequence", "step", "position", "layer", "expert"):
        routing[name] = routing[name].astype(np.int32)  # also where there are none
    for frame in (tokens_frame, routing):
        frame["phase"] = pd.Categorical(frame["phase"], PHASES)
    return routing, tokens_frame


def brute(
    routing: pd.DataFrame, tokens: list[Token], lengths: dict[str, int], whole: int
) -> dict[str, Any]:
    """The sums, by loops over lists."""
    by_step: dict[int, list[Any]] = {i: [] for i in range(len(tokens))}
    for row in routing.itertuples():
        by_step[row.step].append(row)

    def in_stretches(steps: list[int], length: int) -> tuple[int, Counter[tuple[int, int]]]:
        found: Counter[tuple[int, int]] = Counter()
        number = len(steps) // length
        for i in range(number):
            inside = steps[i * length : (i + 1) * length]
            found.update({(r.layer, r.expert) for step in inside for r in by_step[step]})
        return number, found

    sums: dict[str, Any] = {"whole": [0, Counter()]}
    for phase in lengths:
        sums[phase] = {"tokens": 0, "prompts": 0, "count": Counter(), "mass": Counter(),
                       "in": Counter()}  # fmt: skip
    for run, sequence in dict.fromkeys((r, s) for r, s, _ in tokens):
        steps = [i for i, (r, s, p) in enumerate(tokens) if (r, s) == (run, sequence) and
                 p in lengths]  # fmt: skip
        number, found = in_stretches(steps, whole)
        sums["whole"][0] += number
        sums["whole"][1].update(found)
        for phase, length in lengths.items():
            own = [i for i in steps if tokens[i][2] == phase]
            number, found = in_stretches(own, length)
            sums[phase]["tokens"] += len(own)
            sums[phase]["prompts"] += number
            sums[phase]["in"].update(found)
            for step in own:
                for row in by_step[step]:
                    sums[phase]["count"][row.layer, row.expert] += 1
                    sums[phase]["mass"][row.layer, row.expert] += row.weight
    return sums


CHAT: list[Token] = [*[(0, 0, "prefill")] * 7, *[(0, 0, "decode")] * 5, *[(1, 0, "prefill")] * 4]


@settings(max_examples=40, deadline=None)
@example(CHAT, 2, 2, 3, 0)
@example(CHAT * 2, 3, 4, 5, 1)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0, 0, 1]), st.sampled_from(PHASES)),
        max_size=40,
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_frames_add_up(tokens: list[Token], a: int, b: int, whole: int, seed: int) -> None:
    lengths = {"prefill": a, "decode": b}
    routing, frame = frames(tokens, seed)
    tally = Tally(LAYERS, EXPERTS)
    half = len(tokens) // 2
    # In one piece and as two recordings, whose runs are different ones.
    pieces = [(routing, frame, tokens)]
    if seed % 2:
        first = routing["step"] < half, frame["step"] < half
        pieces = [
            (routing[first[0]], frame[first[1]], tokens[:half]),
            (routing[~first[0]].reset_index(drop=True), frame[~first[1]].reset_index(drop=True),
             tokens[half:]),
        ]  # fmt: skip
    for part, part_tokens, _ in pieces:
        tally.add(part, part_tokens, "d", lengths, whole)
    expected = []
    for part, part_tokens, listed in pieces:
        moved = part.assign(step=part["step"] - (part_tokens["step"].min() if listed else 0))
        expected.append(brute(moved, listed, lengths, whole))
    number = sum(e["whole"][0] for e in expected)

    def profile() -> Profile:
        return tally.profile(
            model="m", fingerprint="f", top_k=[2, 2], phase_tokens=lengths, prompt_tokens=whole,
            provenance={},
        )  # fmt: skip

    if number == 0:
        with pytest.raises(ProfileError, match="Nothing"):
            profile()
        return
    made = profile()
    assert made.num_prompts == number

    def total(kind: Any) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for e in expected:
            for key, value in kind(e).items():
                found[key] += value
        return found

    active = total(lambda e: e["whole"][1])
    for layer, experts in zip(LAYERS, EXPERTS, strict=True):
        assert made.activations[layer].tolist() == [active[layer, e] for e in range(experts)]
    uses = {use.phase: use for use in made.uses}
    for phase in lengths:
        if not any(p == phase for _, _, p in tokens):
            assert phase not in uses
            continue
        use = uses[phase]
        assert use.tokens == sum(e[phase]["tokens"] for e in expected)
        assert use.prompts == sum(e[phase]["prompts"] for e in expected)
        for kind, arrays in (("count", use.counts), ("in", use.in_prompts), ("mass", use.mass)):
            sums = total(lambda e, p=phase, k=kind: e[p][k])
            for layer, experts in zip(LAYERS, EXPERTS, strict=True):
                wanted = [sums[layer, e] for e in range(experts)]
                np.testing.assert_allclose(arrays[layer], wanted, rtol=1e-5)


# -- what a profile answers --------------------------------------------------------------------


def small(counts: list[int], prompts: list[int], num_prompts: int = 10) -> Profile:
    """A profile of one layer, 0, with top-2."""
    from moelab.experts.profile import Use

    use = Use(
        "all", "prefill", num_prompts, sum(counts) // 2, {0: np.array(counts)},
        {0: np.array(counts) / 2.0}, {0: np.array(prompts)},
    )  # fmt: skip
    return Profile(
        "m", "f", {0: len(counts)}, {0: 2}, 8, {"prefill": 8}, num_prompts,
        {0: np.array(prompts)}, (use,),
    )  # fmt: skip


def test_order_and_universal() -> None:
    profile = small([4, 9, 0, 4, 5], [3, 5, 0, 4, 10])
    assert profile.order(0) == [1, 4, 3, 0, 2], "by slots, then by prompts, then by id"
    assert profile.universal() == {0: (1, 4)}
    assert profile.universal(0) == {0: (0, 1, 2, 3, 4)}
    assert profile.universal(0.3) == {0: (0, 1, 3, 4)}
    assert profile.universal(1) == {0: (4,)}
    assert profile.uniform_prompt_share(0) == pytest.approx(1 - 0.6**8)
    for wrong in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(ProfileError, match="between 0 and 1"):
            profile.universal(wrong)
    with pytest.raises(ProfileError, match="no layer 7; it has 0"):
        profile.order(7)
    text = repr(profile)
    assert "1 layers of 5, top-2" in text and "2.0 experts a layer" in text
    assert "98.3%" in text and "10 of 8 tokens" in text
    assert "<table>" in profile._repr_html_()


# -- prompts -----------------------------------------------------------------------------------


def test_prompts_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("one\ntwo \n", encoding="utf-8")
    assert [t.text for t in texts_of(lines)[0]] == ["one", "two"]
    paragraphs = tmp_path / "b.md"
    paragraphs.write_text("\none\nmore\n\n\n \ntwo\n", encoding="utf-8")
    found, called = texts_of(str(paragraphs))
    assert [t.text for t in found] == ["one\nmore", "two"] and called == "b.md"
    objects = tmp_path / "c.jsonl"
    objects.write_text('{"text": "a\\nb", "domain": "d", "id": 3}\n\n{"text": "c"}\n"e"\n')
    assert [(t.text, t.domain) for t in texts_of(objects)[0]] == [
        ("a\nb", "d"), ("c", "all"), ("e", "all")
    ]  # fmt: skip
    shipped, called = texts_of(None)
    assert [t.text for t in shipped] == [t["text"] for t in labmodel.texts(split="calibration")]
    assert {t.domain for t in shipped} == set(labmodel.DOMAINS) and "calibration" in called


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("a.txt", b" \n\n", "There is no text"),
        ("a.txt", b"caf\xe9", "no UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "Line 2 of .* is not JSON"),
        ("a.jsonl", b'{"txt": "a"}', "line 1 of .* has no 'text'"),
        ("a.jsonl", b"[1]", "line 1 of .* is no text"),
        ("a.jsonl", b'{"text": "a", "domain": 3}', "domain of line 1 of .* is 3"),
        ("a.jsonl", b"", "There is no text"),
    ],
)
def test_bad_prompts(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        texts_of(path)


def test_bad_arguments() -> None:
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab:
        for message, options in {
            "the longest has 37. Give longer": {"tokens": 38},
            "int from 1 on; got 0": {"tokens": 0},
            "got 2.5": {"tokens": 2.5},
            "decode_tokens is an int from 0 on, got -1": {"decode_tokens": -1},
            "capacity cannot be set": {"capacity": 4},
            "dtype cannot be set": {"dtype": "float32"},
        }.items():
            with pytest.raises(ProfileError, match=message):
                moelab.profile(lab, TEXTS, progress=False, **options)  # type: ignore[arg-type]
        for prompts, message in (([], "no text in prompts"), (["a", 3], "prompt 1"), (7, "got 7")):
            with pytest.raises(ProfileError, match=message):
                moelab.profile(lab, prompts, tokens=2, progress=False)  # type: ignore[arg-type]
        assert not lab.sessions


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 9))
def test_windows(lengths: list[int], tokens: int) -> None:
    class Words:
        bos_token = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [int(word) for word in text.split()]

    texts = texts_of([" ".join(str(100 * i + j) for j in range(n)) for i, n in enumerate(lengths)])
    if max(lengths) < tokens:
        with pytest.raises(ProfileError):
            windows(Words(), texts[0], tokens)
        return
    made = windows(Words(), texts[0], tokens)
    assert [ids for _, ids in made.prompts] == [
        list(range(100 * i + k * tokens, 100 * i + (k + 1) * tokens))
        for i, n in enumerate(lengths)
        for k in range(n // tokens)
    ]
    assert made.too_short == sum(n < tokens for n in lengths)


# -- the command and the shipped profile -------------------------------------------------------


@pytest.fixture
def prompts_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(text) for text in TEXTS), encoding="utf-8")
    yield path


def test_command(prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "p.json"
    model = str(stock.folder("mixtral"))
    command = ["profile", model, "--prompts", str(prompts_file), "--out", str(out)]
    assert cli.main([*command, "--tokens", "7", "--capacity", "4", "--decode-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert "2 layers of 8, top-2" in printed and str(out) in printed
    profile = moelab.read_profile(out)
    with moelab.load(model, 2) as lab:
        again = moelab.profile(lab, TEXTS, tokens=7, decode_tokens=3, progress=False)
        profile.check(lab.fingerprint, lab.sites)
    assert same(profile, again)
    assert profile.provenance["settings"]["decode_tokens"] == 3
    assert cli.main([*command, "--tokens", "900"]) == 1
    assert "No text has 900 tokens" in capsys.readouterr().err
    assert cli.main(["profile", "nothing-there/x", "--out", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err, "before anything is loaded"


def test_an_interrupted_profile_writes_nothing(
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, calls = tmp_path / "p.json", [0]
    own = Tally.add

    def interrupted(self: Tally, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        own(self, *args)

    monkeypatch.setattr(Tally, "add", interrupted)
    path = stock.folder("olmoe")
    with moelab.load(path, 4) as lab:
        with pytest.raises(KeyboardInterrupt):
            moelab.profile(lab, TEXTS, tokens=TOKENS, progress=False)
        assert lab.sessions == [] and calls == [3]
        calls[0] = 0
    command = ["profile", str(path), "--prompts", str(prompts_file), "--out", str(out)]
    assert cli.main([*command, "--tokens", "7", "--capacity", "4"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_the_shipped_profile_is_the_shipped_model_s() -> None:
    profile = moelab.read_profile(Path(__file__).parent.parent / "profiles" / "lab.json")
    texts = labmodel.texts("math", "calibration")[:2]
    with moelab.load("lab", 0.5) as lab:
        profile.check(lab.fingerprint, lab.sites)
        some = moelab.profile(lab, texts, progress=False)
        cut = windows(lab.tokenizer, texts_of(None)[0], 64)
    assert profile.prompt_tokens == 64 and profile.num_prompts == len(cut.prompts)
    assert profile.domains == Counter(domain for domain, _ in cut.prompts)
    # What a part of its texts uses is a part of what it counts.
    whole = {use.domain: use for use in profile.uses}["math"]
    for layer, counts in some.uses[0].counts.items():
        assert (counts <= whole.counts[layer]).all()
        assert whole.counts[layer].sum() == whole.tokens * 6
