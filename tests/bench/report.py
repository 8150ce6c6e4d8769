# SPDX-License-Identifier: Apache-2.0
"""What was measured, as Markdown: the table of what matters, what was missed, then everything."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from . import plots
from .opponents import OPPONENTS, SOCKGW_PATHS
from .results import Measurement, Results, Spread, ratio
from .targets import (
    GATEWAY_CPU,
    IDLE,
    MACHINE_CPU,
    P99,
    SWITCHES,
    THROUGHPUT,
    WITHOUT_IDLE,
    Figure,
    Target,
    against_best,
    against_itself,
    best,
    targets,
)
from .workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_METHOD: Final = Path(__file__).parent / "method.md"
_NOTES: Final = Path(__file__).parent / "notes.md"
"""Written by hand, and on the page of every full run once there is more than its heading."""
_HEAD: Final = """\
# sockgw beside haproxy, nginx, Envoy, Go and no proxy

How much comes through from a client to a server, how late, and what it costs the whole machine.
Public tools make the load; the proxies take turns, in the same run.
"""
_MIB: Final = 1 << 20
_NOISE: Final = 0.05
"""Share of the machine that, taken by others, makes a figure doubtful."""
_ON_PATH: Final = 0.95
"""Share of a column's sessions and bytes that must have been on the path it is named after."""
_MANY_SESSIONS: Final = 200
"""From so many on sessions count: wrk opens one before each run that asks for nothing."""
_NETWORKS: Final = {
    "loopback": (
        "Over loopback",
        "Client, proxy and server on one machine, at 127.0.0.1.",
    ),
    "namespaces": (
        "Between network namespaces",
        (
            "Client, proxy and server each in a network namespace, on one machine, with veth links"
            " from client and server to the proxy's, which routes for those with no proxy. The"
            " workloads and the opponents are those that say most of wire and direct."
        ),
    ),
}
_TITLES: Final = {one.name: one.title for one in OPPONENTS}
_WORKLOADS: Final = {one.name: one for one in WORKLOADS}


# What the project's original description claims against the Go proxy, at
# 10,000 connections and 1 KiB.
_CLAIMS: Final = (
    (P99, -52),
    (MACHINE_CPU, -58),
    (GATEWAY_CPU, -58),
    (THROUGHPUT, 87),
    (SWITCHES, -90),
)
_CLAIM_UNITS: Final = {
    P99: ", µs",
    MACHINE_CPU: ", µs/request",
    GATEWAY_CPU: ", µs/request",
    THROUGHPUT: ", requests/s",
    SWITCHES: " per request",
}
_CLAIMED_AT: Final = "keepalive-10000"
_REPEAT: Final = """\
`make bench`, on a machine that does nothing else, installs what is missing, takes 110 minutes
and rewrites this page; what it says of missed rows comes from [notes.md](../tests/bench/notes.md).
`make bench-quick` takes seven minutes and writes to `.bench/quick/`. A part:

```
make bench BENCH_ARGS="--network namespaces --rounds 3 --duration 2 --output /tmp/bench \\
    --workloads keepalive-1000 --opponents haproxy,sockgw-wire"
```

and a page of results that two runs have saved:

```
.venv/bin/python -m tests.bench --output docs --report .bench/last-*.json
```

Each measurement, with the settings, and what each gateway counted: {files}."""


def write(runs: Sequence[Results], directory: Path) -> Path:
    """Write benchmarks.md, and beside it benchmarks/ with plots and JSON; return the former."""
    path = directory / "benchmarks.md"
    sections = (
        _HEAD,
        *(section for results in runs for section in _run_sections(results, directory)),
        _NOTES.read_text().replace("# ", "## ", 1) if _has_notes(runs) else "",
        "## Everything\n",
        *(section for results in runs for section in _detail_sections(results)),
        f"## Method\n\n{_METHOD.read_text()}",
        _version_section(runs),
        _repeat_section(runs),
    )
    path.write_text("\n".join(section for section in sections if section))
    return path


def _run_sections(results: Results, directory: Path) -> Iterator[str]:
    beside = _beside(results, directory)
    beside.mkdir(parents=True, exist_ok=True)
    results.dump(beside / "results.json")
    yield _run_head(results)
    yield _overview_section(results)
    yield _target_section(results)
    yield _path_section(results)
    yield _loss_section(results)
    yield _claim_section(results)
    yield _idle_section(results)
    yield _picture_section(directory, plots.draw(results, beside))
    yield _omission_section(results)


def _detail_sections(results: Results) -> Iterator[str]:
    if results.measurements:
        yield f"### {_NETWORKS[results.settings['network']][0]}\n"
    for workload in WORKLOADS:
        yield _workload_section(results, workload)


def _beside(results: Results, directory: Path) -> Path:
    return directory / "benchmarks" / results.settings["network"]


def summary(results: Results) -> str:
    """Return what a terminal is told: throughput and p99, and what makes them doubtful."""
    lines = [_NETWORKS[results.settings["network"]][0]]
    for workload in WORKLOADS:
        rows = [
            (name, results.of(workload.name, name))
            for name in _TITLES
            if results.of(workload.name, name)
        ]
        if rows:
            lines.append(f"\n{workload.title}")
        for name, found in rows:
            median = statistics.median(one.throughput for one in found)
            p99 = [one.latency_us["p99"] for one in found if one.latency_us]
            lines.append(
                f"  {_TITLES[name]:20} {median:>12,.1f} {workload.unit:10}"
                + (f"  p99 {statistics.median(p99):>9,.0f} us" if p99 else "")
                + (f"  {sum(one.errors for one in found)} errors" if _errors(found) else "")
            )
    lines.append("")
    lines += [f"not measured: {line}" for line in _omissions(results)]
    lines += [
        f"off its path: {', '.join(cells[:2])}: {cells[2]} sessions, {cells[3]} bytes"
        for cells in _off_path(results)
    ]
    lines += _noise(results)
    return "\n".join(lines)


def _run_head(results: Results) -> str:
    machine, settings = results.machine, results.settings
    timing = settings["timing"]
    rounds = max((one.round for one in results.measurements), default=0)
    heading, setup = _NETWORKS[settings["network"]]
    lines = [
        f"## {heading}",
        "",
        setup,
        "",
        (
            f"{'All' if settings['is_full'] else 'A part'} of the benchmark, run at"
            f" {results.started}; rounds: {rounds}, each measurement"
            f" {timing['duration_s']} s after {timing['warm_up_s']} s of warm-up."
            " Figures are medians of the rounds"
            " (lowest-highest)."
        ),
        *([] if settings["is_full"] else ["", "**A short run: its ratios are hints.**"]),
        "",
        *_noise(results),
    ]
    memory_gib = machine["memory_bytes"] / (1 << 30)
    virtual = ", virtual" if machine["hypervisor"] else ""
    lines += [
        "",
        (
            f"{machine['cpus']} CPUs ({machine['cpu']}{virtual}), {memory_gib:.0f} GiB,"
            f" {machine['distribution']}, Linux {machine['kernel']};"
            f" {settings['workers']} workers for each proxy;"
            f" {settings['nofile']:,} descriptors a process."
        ),
        "",
    ]
    return "\n".join(lines)


def _overview_section(results: Results) -> str:
    names = [name for name in _TITLES if any(one.opponent == name for one in results.measurements)]
    rows = []
    for workload in WORKLOADS:
        medians = {
            name: statistics.median(one.throughput for one in found)
            for name in names
            if (found := results.of(workload.name, name))
        }
        most = max((value for name, value in medians.items() if name != "none"), default=None)
        cells = (
            "-"
            if (value := medians.get(name)) is None
            else f"**{_number(value)}**"
            if value == most and name != "none"
            else _number(value)
            for name in names
        )
        if medians:
            rows.append(f"| {workload.title} | {workload.unit} | {' | '.join(cells)} |")
    if not rows:
        return ""
    return _section(
        "Throughput in one table",
        "Bold: the fastest proxy.",
        "",
        f"| workload | | {' | '.join(_TITLES[name] for name in names)} |",
        "|---|---" + "|---:" * len(names) + "|",
        *rows,
    )


def _version_section(runs: Sequence[Results]) -> str:
    versions = {name: version for results in runs for name, version in results.versions.items()}
    return _section(
        "Versions",
        "| | |",
        "|---|---|",
        *(
            f"| {_TITLES.get(name, name)} | {version} |"
            for name, version in versions.items()
            if name != "none"
        ),
        level=2,
    )


def _has_notes(runs: Sequence[Results]) -> bool:
    _heading, _, notes = _NOTES.read_text().partition("\n")
    return any(results.settings["is_full"] for results in runs) and bool(notes.strip())


def _target_section(results: Results) -> str:
    rows = []
    for target in targets(results.settings["network"]):
        is_wanted = (
            target.workload in results.settings["workloads"]
            and f"sockgw-{target.accel}" in results.settings["opponents"]
        )
        if not is_wanted:
            continue
        found, against = target.found(results)
        sign = "≥" if target.figure.more_is_better else "≤"
        against = "itself without" if target.baseline else _TITLES.get(against, "-")
        rows.append(
            f"| {_WORKLOADS[target.workload].title} | {target.figure.name} | {target.accel}"
            f" | {sign} {target.bound:g} | {_ratio(found) if found else '-'} | {against}"
            f" | {_verdict(results, target, found)} |"
        )
    if not rows:
        return ""
    return _section(
        "What sockgw must reach",
        (
            "Ratios against the best of haproxy, nginx and Envoy in that figure, or against who is"
            " named; beside idle sessions, against sockgw without them."
        ),
        "",
        "| workload | of | path | wanted | found | against | reached |",
        "|---|---|---|---|---|---|---|",
        *rows,
    )


def _verdict(results: Results, target: Target, found: Spread | None) -> str:
    if found is None:
        return "not measured"
    errors = _errors(results.of(target.workload, f"sockgw-{target.accel}"))
    if errors:
        return f"**no**: {errors:,} errors"
    return "yes" if target.is_reached(found) else "**no**"


def _claim_section(results: Results) -> str:
    if _CLAIMED_AT not in results.settings["workloads"]:
        return ""
    rows = []
    for figure, claimed in _CLAIMS:
        ours = results.values(_CLAIMED_AT, "sockgw-splice", figure.of)
        cells = [f"{claimed:+d} %", _spread(list(ours.values()))]
        for name in ("go", "sockgw-off"):
            theirs = results.values(_CLAIMED_AT, name, figure.of)
            cells += [_spread(list(theirs.values())), _change(ratio(ours, theirs))]
        rows.append(f"| {figure.name}{_CLAIM_UNITS[figure]} | {' | '.join(cells)} |")
    return _section(
        "The original table",
        (
            "Splice at 10,000 connections and 1 KiB: what the project's first description claimed"
            " against a Go proxy, and what is true here, against that and against our own relay."
        ),
        "",
        "| | claimed | splice | Go | splice against Go | relay | splice against the relay |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
    )


def _idle_section(results: Results) -> str:
    rows = []
    for name in _TITLES:
        without = results.values(WITHOUT_IDLE, name, THROUGHPUT.of)
        beside = results.values(IDLE, name, THROUGHPUT.of)
        if without and beside:
            changes = (
                _change(against_itself(results, IDLE, WITHOUT_IDLE, figure, name))
                for figure in (THROUGHPUT, P99, MACHINE_CPU)
            )
            values = (_spread(list(found.values())) for found in (without, beside))
            rows.append(f"| {_TITLES[name]} | {' | '.join((*values, *changes))} |")
    if not rows:
        return ""
    return _section(
        "Beside idle sessions",
        (
            f"{_WORKLOADS[IDLE].connections} busy connections alone, and beside"
            f" {_WORKLOADS[IDLE].idle:,} sessions that have asked once and say nothing more. The"
            " changes are round by round. Who cannot hold these in one process runs as several"
            " here, which is part of the change."
        ),
        "",
        "| | alone, requests/s | beside idle ones | throughput | p99 | CPU of the machine |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
    )


def _loss_section(results: Results) -> str:
    if not results.measurements:
        return ""
    rows = []
    for workload in WORKLOADS:
        for accel in SOCKGW_PATHS:
            cells = [
                _against_best_cell(results, workload, figure, accel)
                for figure in (THROUGHPUT, P99, MACHINE_CPU)
            ]
            if any(cell.startswith("**") for cell in cells):
                rows.append(f"| {workload.title} | {accel} | {' | '.join(cells)} |")
    if not rows:
        return _section("Where sockgw loses", "Nowhere in this run.")
    return _section(
        "Where sockgw loses",
        "Ratios against the best of haproxy, nginx and Envoy in that figure; bold: it is better.",
        "",
        "| workload | path | throughput | p99 | CPU of the machine |",
        "|---|---|---|---|---|",
        *rows,
    )


def _against_best_cell(results: Results, workload: Workload, figure: Figure, accel: str) -> str:
    found, against = against_best(results, workload.name, figure, accel)
    if found is None:
        return "-"
    loses = found.median < 1 if figure.more_is_better else found.median > 1
    return f"**{_ratio(found)}** {against}" if loses else f"{_ratio(found)} {against}"


def _picture_section(directory: Path, pictures: Iterable[Path]) -> str:
    lines = [f"![{path.stem}]({path.relative_to(directory)})" for path in pictures]
    return _section("1 KiB keep-alive requests against connections", *lines) if lines else ""


def _workload_section(results: Results, workload: Workload) -> str:
    operation = workload.operation
    measured = [one for one in results.measurements if one.workload == workload.name]
    latencies = [
        name for name in ("p50", "p99", "p99.9") if any(name in one.latency_us for one in measured)
    ]
    is_counted = any(one.is_counted for one in measured)
    cells = [
        "",
        workload.unit,
        "of the best",
        *(["when all are open"] if is_counted else []),
        *(f"{name} µs" for name in latencies),
        f"machine CPU µs/{operation}",
        f"proxy CPU µs/{operation}",
        f"kernel threads µs/{operation}",
        f"switches/{operation}",
        "TCP memory MiB",
        "slab MiB",
        "resident MiB",
        "errors",
    ]
    rows = []
    for name in _TITLES:
        found = results.of(workload.name, name)
        if found:
            values = [_TITLES[name], *_row(results, workload, name, found, latencies)]
            rows.append(f"| {' | '.join(values)} |")
    if not rows:
        return ""
    heading = workload.title[0].upper() + workload.title[1:]
    header = f"| {' | '.join(cells)} |"
    rule = "|---" + "|---:" * (len(cells) - 1) + "|"
    return _section(heading, header, rule, *rows, level=4)


def _path_section(results: Results) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in _off_path(results)]
    if not rows:
        return ""
    return _section(
        "Where a column is not what it is called",
        (
            f"Less than {_ON_PATH:.0%} of the sessions, or of the bytes, were on the path that the"
            " column is named after, warm-up and the opening of connections included; the others"
            " were on a slower one. By sockgw's own metrics."
        ),
        "",
        "| workload | column | sessions on its path | bytes on its path |",
        "|---|---|---:|---:|",
        *rows,
    )


def _off_path(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield workload, column and the shares of its sessions and bytes on its path, if too few."""
    for workload in WORKLOADS:
        for accel in SOCKGW_PATHS[1:]:  # the first is the relay, which is the slowest
            name = f"sockgw-{accel}"
            found = results.of(workload.name, name)
            sessions, moved = (
                sum((one.by_path(metric) for one in found), Counter())
                for metric in ("gateway_sessions_total", "gateway_bytes_total")
            )
            of_sessions, of_bytes = (
                counts[accel] / max(1, counts.total()) for counts in (sessions, moved)
            )
            are_many = sessions.total() >= _MANY_SESSIONS
            if found and (of_bytes < _ON_PATH or (are_many and of_sessions < _ON_PATH)):
                yield (
                    workload.title,
                    _TITLES[name],
                    f"{of_sessions:.1%} of {sessions.total():,}",
                    f"{of_bytes:.1%}",
                )


def _row(
    results: Results,
    workload: Workload,
    name: str,
    found: list[Measurement],
    latencies: Iterable[str],
) -> Iterator[str]:
    yield _spread([one.throughput for one in found])
    against = best(results, workload.name, THROUGHPUT)
    mine = results.values(workload.name, name, THROUGHPUT.of)
    compared = (
        ratio(mine, results.values(workload.name, against, THROUGHPUT.of)) if against else None
    )
    yield _ratio(compared) if compared and name != against else ("1" if compared else "-")
    if any(one.is_counted for one in found):
        yield _spread([rate for one in found if (rate := one.steady_per_s) is not None])
    for latency in latencies:
        yield _spread([one.latency_us[latency] for one in found])
    yield _spread([one.machine_cpu_us for one in found])
    is_there = name != "none"
    yield _spread([one.gateway_cpu_us for one in found]) if is_there else "-"
    yield _number(statistics.median(one.kernel_cpu_us for one in found))
    yield _number(statistics.median(one.gateway_switches for one in found)) if is_there else "-"
    for size in ("tcp_memory_bytes", "slab_bytes", "resident_bytes"):
        yield f"{statistics.median(getattr(one, size) for one in found) / _MIB:,.0f}"
    yield str(_errors(found))


def _omission_section(results: Results) -> str:
    lines = [f"- {line}" for line in _omissions(results)]
    return _section("Not measured", *lines) if lines else ""


def _omissions(results: Results) -> list[str]:
    return [
        ", ".join(filter(None, (_TITLES.get(one.opponent, one.opponent), one.workload)))
        + (": " if one.opponent or one.workload else "")
        + one.reason
        for one in results.omissions
    ]


def _repeat_section(runs: Sequence[Results]) -> str:
    files = (_beside(results, Path()) / "results.json" for results in runs)
    links = ", ".join(f"[{file.parent.name}]({file})" for file in files)
    return _section("Repeat it", _REPEAT.format(files=links), level=2)


def _noise(results: Results) -> list[str]:
    shares = [one.other_load for one in results.measurements]
    if not shares:
        return []
    text = (
        f"Other processes took {statistics.median(shares):.1%} of the machine (median;"
        f" {max(shares):.1%} at most)."
    )
    if statistics.median(shares) > _NOISE:
        text += " **The machine was not idle: these figures are noise.**"
    return [text]


def _errors(found: Iterable[Measurement]) -> int:
    return sum(one.errors for one in found)


def _section(heading: str, *lines: str, level: int = 3) -> str:
    return "\n".join((f"{'#' * level} {heading}", "", *lines, ""))


def _ratio(found: Spread) -> str:
    digits = 2 if found.median >= 0.1 else 4  # or a small one is all noughts
    median, low, high = (f"{value:.{digits}f}" for value in (found.median, found.low, found.high))
    return median if low == high else f"{median} ({low}-{high})"


def _change(found: Spread | None) -> str:
    if found is None:
        return "-"
    median, low, high = ((value - 1) * 100 for value in (found.median, found.low, found.high))
    spread = "" if low == high else f" ({low:+.0f} to {high:+.0f})"
    return f"{median:+.0f} %{spread}"


def _spread(values: list[float]) -> str:
    found = Spread.of(values)
    if found is None:
        return "-"
    if len(values) == 1:
        return _number(found.median)
    return f"{_number(found.median)} ({_number(found.low)}-{_number(found.high)})"


def _number(value: float) -> str:
    """Return three significant digits, more where there are more before the point."""
    magnitude = abs(value)
    if magnitude >= 100 or not value:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 1 else f"{value:.3g}"
