# SPDX-License-Identifier: Apache-2.0
"""The plots: throughput, p99 and CPU per request against connections, a line for each opponent."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING, Final

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: there may be no display
from matplotlib import pyplot as plt
from PIL import Image

from .opponents import OPPONENTS
from .workloads import WORKLOADS, Http

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .results import Measurement, Results
    from .workloads import Workload

_KEEPALIVE: Final = tuple(
    one for one in WORKLOADS if isinstance(one, Http) and one.keep_alive and not one.idle
)
_PLOTS: Final[dict[str, tuple[str, bool, Callable[[Measurement], float]]]] = {
    "throughput": ("requests/s", False, lambda one: one.throughput),
    "p99": ("p99, µs", True, lambda one: one.latency_us["p99"]),
    "cpu": ("CPU of the machine, µs per request", False, lambda one: one.machine_cpu_us),
}
_DPI: Final = 140
_COLOURS_IN_FILE: Final = 64
# Ours are drawn strongest; the order is that of the tables.
_COLOURS: Final = (
    *("0.6", "#4477aa", "#228833", "#aa3377", "#66ccee"),
    *("#ccbb44", "#ee6677", "#222255"),
)


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw every plot that has at least two points on its axis; return the files."""
    points = [
        one for one in _KEEPALIVE if any(m.workload == one.name for m in results.measurements)
    ]
    for name in _PLOTS:  # of an earlier run
        (directory / f"{name}.png").unlink(missing_ok=True)
    if len(points) < 2:
        return []
    return [_draw_one(results, points, name, directory) for name in _PLOTS]


def _draw_one(results: Results, points: Sequence[Workload], name: str, directory: Path) -> Path:
    label, is_log, of = _PLOTS[name]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, opponent in enumerate(OPPONENTS):
        rounds = {
            point.connections: list(values.values())
            for point in points
            if (values := results.values(point.name, opponent.name, of))
        }
        if not rounds:
            continue
        medians = [statistics.median(values) for values in rounds.values()]
        pairs = list(zip(medians, rounds.values(), strict=True))
        below = [median - min(values) for median, values in pairs]
        above = [max(values) - median for median, values in pairs]
        is_ours = opponent.name.startswith("sockgw")
        axes.errorbar(
            list(rounds),
            medians,
            yerr=(below, above),
            label=opponent.title,
            color=_COLOURS[number % len(_COLOURS)],
            linewidth=2.5 if is_ours else 1.5,
            linestyle="--" if opponent.name == "none" else "-",
            marker="o",
            markersize=5 if is_ours else 3.5,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xticks([point.connections for point in points])
    axes.set_xticklabels([f"{point.connections:,}" for point in points])
    axes.minorticks_off()
    axes.set_xlabel("connections")
    axes.set_ylabel(label)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    plt.close(figure)
    path = directory / f"{name}.png"
    # It is committed with every full run: in a palette it is a third as large.
    Image.open(drawn).convert("RGB").quantize(_COLOURS_IN_FILE).save(path, optimize=True)
    return path
