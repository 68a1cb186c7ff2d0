"""The command line: thin subcommands over functions that a notebook can call as well."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MoelabError

if TYPE_CHECKING:
    from .experts.capacity import Capacity  # not at run time: it imports mlx, see backend.py


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `moelab …`.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        The exit status: 0 fine, 1 an error that was explained, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        computes = command not in (_plan, _pack)  # a plan must not download the model
        if computes and getattr(arguments, "model", None) not in (None, "bench"):
            from .backend import use_openblas_for

            use_openblas_for(arguments.model)
        return command(arguments)
    except MoelabError as error:
        print(f"moelab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moelab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moelab … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def capacity(text: str) -> Capacity:
    """Reads a capacity as a user types it: `24` counts experts, `0.5` is a share, or `auto`."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="moelab",
        description="Run Mixture-of-Experts models with part of their experts in memory.",
    )
    parser.add_argument("--version", action="version", version=f"moelab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    one = commands.add_parser("demo", help="generate, record and draw, with the shipped model")
    _model(one)
    one.add_argument("--capacity", type=capacity, default=0.5, help="experts a layer (default 0.5)")
    one.add_argument("--out", default="moelab-demo", help="folder for charts (%(default)s)")
    one.add_argument("--max-tokens", type=int, default=100, help="for each answer (%(default)s)")
    one.set_defaults(command=_demo)

    one = commands.add_parser("plan", help="whether and how a model would run here; no download")
    _model(one)
    one.add_argument("--context", type=int, default=None, help="tokens to leave room for")
    one.add_argument("--budget", type=float, default=None, help="GB of memory to take")
    one.add_argument("--kv-bits", type=int, default=None, help="bits of the cache: 8 or 4")
    one.set_defaults(command=_plan)

    one = commands.add_parser("check", help="check on this machine what moelab promises")
    _model(one)
    one.add_argument("--capacity", type=capacity, default=None, help="experts a layer")
    one.add_argument("--out", default="moelab-check", help="folder for the report (%(default)s)")
    one.set_defaults(command=_check)

    one = commands.add_parser("profile", help="count which experts a model uses on your prompts")
    _model(one)
    one.add_argument(
        "--prompts", default=None, metavar="FILE",
        help=".jsonl with 'text' and 'domain', or text with blank lines between prompts (default: "
        "the calibration texts that ship with moelab)",
    )  # fmt: skip
    one.add_argument("--out", default="profile.json", help="the profile (%(default)s)")
    one.add_argument("--tokens", type=int, default=64, help="tokens a prompt (%(default)s)")
    one.add_argument(
        "--decode-tokens", type=int, default=0, help="to generate after each (%(default)s)"
    )
    one.add_argument(
        "--capacity", type=capacity, default="auto", help="experts a layer (%(default)s)"
    )
    one.set_defaults(command=_profile)
    one = commands.add_parser("families", help="try every mlx-lm family that has experts")
    one.add_argument("--only", default=None, help="names, with commas between them")
    one.add_argument("--out", default=None, help="folder for families.md")
    one.set_defaults(command=_families)

    one = commands.add_parser("pack", help="write the experts one after another into a pack file")
    _model(one)
    one.add_argument(
        "--verify", action="store_true", help="read the pack file that is there and check it"
    )
    one.set_defaults(command=_pack)

    one = commands.add_parser("study", help="what capacity costs in quality, and why: all of it")
    _model(one)
    one.add_argument("--out", default="moelab-study", help="folder for the findings (%(default)s)")
    one.add_argument(
        "--scale", choices=("full", "signs", "tiny"), default="full",
        help="full; signs: smaller, for more trainings of a model; tiny: to see that it runs",
    )  # fmt: skip
    one.add_argument("--only", default=None, help="parts, with commas between them")
    one.add_argument("--again", action="store_true", help="also run parts that are finished")
    one.set_defaults(command=_study)

    one = commands.add_parser("lessons", help="which lessons hold in every training of a model")
    one.add_argument("folders", nargs="+", help="folders of studies, the main training first")
    one.add_argument("--out", default=None, help="folder for lessons.md and lessons.csv")
    one.set_defaults(command=_lessons, model=None)

    one = commands.add_parser("bench", help="measure speed as a ratio to stock mlx-lm")
    kinds = one.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    two = kinds.add_parser("decode", help="decoding at several capacities, against stock")
    _model(two)
    two.add_argument("--rounds", type=int, default=15, help="measured rounds (%(default)s)")
    two.add_argument("--tokens", type=int, default=64, help="tokens a round (%(default)s)")
    two.add_argument("--shares", type=_numbers(float), default=None, help=_SHARES)
    two.add_argument("--policy", default="lru", help="names with commas, or all (%(default)s)")
    two.add_argument("--on-miss", default="load", help="names with commas, or all (%(default)s)")
    _bench(two, "decode")
    two.set_defaults(command=_bench_decode)
    two = kinds.add_parser("load", help="experts from disk into slots, against a bare read")
    two.add_argument(
        "model", nargs="?", default="bench", help="'bench' (made on demand), a folder, a name"
    )
    two.add_argument("--rounds", type=int, default=15, help="measured rounds (%(default)s)")
    two.add_argument("--seed", type=int, default=0, help="order and experts (%(default)s)")
    two.add_argument("--out", default=None, help="folder for bench-load.json and .md")
    two.set_defaults(command=_bench_load)

    two = kinds.add_parser("prefill", help="time to the first token, against stock")
    _model(two)
    two.add_argument("--rounds", type=int, default=7, help="measured rounds (%(default)s)")
    two.add_argument("--lengths", type=_numbers(int), default=None, help="tokens: 64,256,1024")
    two.add_argument("--shares", type=_numbers(float), default=None, help=_SHARES)
    _bench(two, "prefill")
    two.set_defaults(command=_bench_prefill)

    two = kinds.add_parser("swap", help="cost of filling one slot, against the number of slots")
    _model(two, "bench")
    two.add_argument("--rounds", type=int, default=15, help="measured rounds (%(default)s)")
    two.add_argument("--fills", type=int, default=32, help="slots filled a round (%(default)s)")
    _bench(two, "swap")
    two.set_defaults(command=_bench_swap)

    two = kinds.add_parser("curves", help="time and memory of miss-ratio curves of a long trace")
    two.add_argument("--tokens", type=int, default=100_000, help="decoded (%(default)s)")
    two.add_argument("--layers", type=int, default=48, help="(default %(default)s)")
    two.add_argument("--seed", type=int, default=0, help="of the trace (%(default)s)")
    two.add_argument("--out", default=None, help="folder for bench-curves.json and .md")
    two.set_defaults(command=_bench_curves, model=None)

    two = kinds.add_parser("forecast", help="forecasts of seconds against live runs")
    _model(two)
    two.add_argument("--rounds", type=int, default=5, help="live runs a point (%(default)s)")
    _bench(two, "forecast")
    two.set_defaults(command=_bench_forecast)
    return parser


_SHARES = "shares of the experts in memory, such as 0.5,0.25"


def _bench(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds what every benchmark takes, and what its model may be besides."""
    parser.add_argument("--seed", type=int, default=0, help="order of the rounds (%(default)s)")
    parser.add_argument("--out", default=None, help=f"folder for bench-{name}.json and .md")
    parser.epilog = (
        "MODEL may also be 'bench': random weights with experts of realistic size, 1 GB, which is "
        "made when first asked for and kept in the user's cache folder."
    )


def _numbers(kind: type[int] | type[float]) -> Callable[[str], list[float]]:
    """Reads numbers with commas between them."""

    def read(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"  # argparse names it when it fails
    return read


def _model(parser: argparse.ArgumentParser, default: str = "lab") -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=default,
        help=f"'lab' (shipped), a folder, or a name on the hub (default {default})",
    )


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo, summary

    made = demo(
        arguments.model, arguments.capacity, folder=arguments.out, max_tokens=arguments.max_tokens
    )
    print(summary(made))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from .planning import plan

    print(
        plan(
            arguments.model,
            context=arguments.context,
            budget_gb=arguments.budget,
            kv_bits=arguments.kv_bits,
        )
    )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from .check import check

    report = check(arguments.model, capacity=arguments.capacity)
    report.save(Path(arguments.out))
    print(report.page())
    print(f"\nThis page and check.json, the file to send: {arguments.out}/")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from .experts.profile_file import writable
    from .profiling import profile

    out = writable(arguments.out)  # before the work, not after it
    made = profile(
        arguments.model,
        arguments.prompts,
        tokens=arguments.tokens,
        decode_tokens=arguments.decode_tokens,
        capacity=arguments.capacity,
    )
    print(made)
    print(f"\nWritten to {made.save(out)}")
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from .study.program.run import study

    only = arguments.only
    found = study(
        arguments.model,
        out=arguments.out,
        scale=arguments.scale,
        only=None if only is None else [n.strip() for n in only.split(",") if n.strip()],
        again=arguments.again,
    )
    print(found)
    return 0


def _lessons(arguments: argparse.Namespace) -> int:
    from .study.program.run import lessons_of, lessons_page

    table = lessons_of(arguments.folders)
    page = lessons_page(table)
    print(page)
    if arguments.out is not None:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lessons.md").write_text(page, encoding="utf-8")
        table.to_csv(folder / "lessons.csv", index=False, float_format="%.6g")
    return 0


def _families(arguments: argparse.Namespace) -> int:
    from .check.families.table import family_table

    only = arguments.only
    table = family_table(
        None if only is None else [n.strip() for n in only.split(",") if n.strip()]
    )
    print(table.page(), end="")
    if arguments.out is not None:
        table.save(Path(arguments.out))
    return 1 if table.failed else 0


def _pack(arguments: argparse.Namespace) -> int:
    from .checkpoint.pack import pack, verify

    if arguments.verify:
        print(f"{verify(arguments.model)}: every expert is what was written")
    else:
        print(pack(arguments.model))
    return 0


def _bench_decode(arguments: argparse.Namespace) -> int:
    from .bench.decode import SHARES, bench_decode

    result = bench_decode(
        arguments.model,
        rounds=arguments.rounds,
        tokens=arguments.tokens,
        shares=arguments.shares or SHARES,
        policies=arguments.policy,
        on_miss=arguments.on_miss,
        seed=arguments.seed,
    )
    return _shown(result, arguments.out)


def _bench_prefill(arguments: argparse.Namespace) -> int:
    from .bench.prefill import LENGTHS, SHARES, bench_prefill

    result = bench_prefill(
        arguments.model,
        rounds=arguments.rounds,
        lengths=arguments.lengths or LENGTHS,
        shares=arguments.shares or SHARES,
        seed=arguments.seed,
    )
    return _shown(result, arguments.out)


def _bench_swap(arguments: argparse.Namespace) -> int:
    from .bench.swap import bench_swap

    result = bench_swap(
        arguments.model, rounds=arguments.rounds, fills=arguments.fills, seed=arguments.seed
    )
    return _shown(result, arguments.out)


def _bench_curves(arguments: argparse.Namespace) -> int:
    from .bench.curves import bench_curves

    result = bench_curves(tokens=arguments.tokens, layers=arguments.layers, seed=arguments.seed)
    return _shown(result, arguments.out)


def _bench_forecast(arguments: argparse.Namespace) -> int:
    from .bench.forecast import bench_forecast

    result = bench_forecast(arguments.model, rounds=arguments.rounds, seed=arguments.seed)
    return _shown(result, arguments.out)


def _shown(result: Any, folder: str | None) -> int:
    """Prints a benchmark's page, and saves it where that was asked for."""
    print(result.page())
    if folder is not None:
        result.save(Path(folder))
    return 0


def _bench_load(arguments: argparse.Namespace) -> int:
    from .bench.load import bench_load

    result = bench_load(arguments.model, rounds=arguments.rounds, seed=arguments.seed)
    print(result.page())
    if arguments.out is not None:
        result.save(Path(arguments.out))
    return 0
