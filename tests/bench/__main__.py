# SPDX-License-Identifier: Apache-2.0
"""The command line: measure, then say what was measured."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from . import report
from .network import NETWORKS
from .opponents import OPPONENTS, work_directory
from .plan import ALL, FULL, QUICK, Plan, Run
from .processes import BenchError, end_on_signals
from .results import Results
from .workloads import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_DOCS = Path(__file__).parents[2] / "docs"
_INTERRUPTED = 130


def main() -> int:
    """Carry out what the command line asks for; return the exit code."""
    options = _options()
    plans = tuple(_plans(options))
    output: Path = options.output or (_DOCS if plans == FULL else work_directory() / "quick")
    if options.report:
        return _report([Results.load(path) for path in options.report], output)
    for plan in plans:
        _saved(plan).unlink(missing_ok=True)
    end_on_signals()
    try:
        runs = [_carry_out(plan) for plan in plans]
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = ", ".join(str(_saved(plan)) for plan in plans)
        print(f"bench: interrupted; complete rounds, if any, are in {saved}", file=sys.stderr)
        return _INTERRUPTED
    return _report(runs, output)


def _carry_out(plan: Plan) -> Results:
    run = Run(plan)
    progress: tqdm[NoReturn]
    with tqdm(total=run.cells, unit="run", disable=None, dynamic_ncols=True) as progress:
        run.carry_out(progress, _saved(plan))
    return run.results


def _saved(plan: Plan) -> Path:
    return work_directory() / f"last-{plan.network}.json"


def _report(runs: Sequence[Results], output: Path) -> int:
    path = report.write(runs, output)
    print("\n\n".join(report.summary(results) for results in runs))
    print(f"\nAll of it: {path}")
    return 0 if any(results.measurements for results in runs) else 1


def _plans(options: argparse.Namespace) -> Iterator[Plan]:
    changes = {
        name: value
        for name in ("workloads", "opponents", "rounds", "workers")
        if (value := getattr(options, name)) is not None
    }
    for plan in QUICK if options.quick else FULL:
        timing = Timing(
            plan.timing.warm_up_s if options.warm_up is None else options.warm_up,
            plan.timing.duration_s if options.duration is None else options.duration,
        )
        if plan.network in options.network:
            yield replace(plan, timing=timing, **changes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure sockgw beside haproxy, nginx, Envoy, Go and no proxy.",
    )
    names = [opponent.name for opponent in OPPONENTS]
    parser.add_argument("--quick", action="store_true", help="less of it, within seven minutes")
    parser.add_argument(
        "--network",
        type=_names(tuple(NETWORKS)),
        default=tuple(NETWORKS),
        metavar="NAME,...",
        help=f"of {', '.join(NETWORKS)}: where client, gateway and backend are; both",
    )
    parser.add_argument(
        "--workloads", type=_names(ALL), metavar="NAME,...", help=f"of {', '.join(ALL)}"
    )
    parser.add_argument(
        "--opponents", type=_names(names), metavar="NAME,...", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--duration", type=int, metavar="S", help="of a measurement")
    parser.add_argument("--warm-up", type=int, metavar="S", help="before each")
    parser.add_argument("--workers", type=int, metavar="N", help="of each proxy; the CPUs")
    parser.add_argument(
        *("--output", "-o"), type=Path, metavar="DIRECTORY", help="for benchmarks.md and the rest"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: report these results, one of each network",
    )
    return parser.parse_args()


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def name_list(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = set(names) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
        return names

    return name_list


if __name__ == "__main__":
    sys.exit(main())
