# SPDX-License-Identifier: Apache-2.0
"""The paths that the suite runs on: the one list to extend when a path is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet


@dataclass(frozen=True)
class PathUnderTest:
    """One way to run the whole suite."""

    accel: str  # the value of --accel
    label: str  # the value of the `path` label in metrics and logs
    in_kernel: bool  # whether the bytes pass by without our process
    processes: int = 1  # the value of --processes

    @property
    def exchanges(self) -> int:
        """How many it takes at most until a session is on the path."""
        return 3 if self.label == "wire" else 1

    @property
    def is_spliced(self) -> bool:
        """Whether the verdict moves the bytes."""
        return self.label == "splice"

    @property
    def name(self) -> str:
        """The id that a test has on it."""
        return self.accel if self.processes == 1 else f"{self.accel}-{self.processes}"


# Every sentence of the suite holds on each of these, whatever the number of
# processes.
PATHS = (
    PathUnderTest(accel="off", label="relay", in_kernel=False),
    PathUnderTest(accel="splice", label="splice", in_kernel=True),
    PathUnderTest(accel="splice", label="splice", in_kernel=True, processes=2),
    PathUnderTest(accel="wire", label="wire", in_kernel=False),
    PathUnderTest(accel="direct", label="direct", in_kernel=True),
)


def each(*paths: PathUnderTest) -> list[ParameterSet]:
    """Return parameters: a number of processes that a sentence does not speak of takes long."""
    return [
        pytest.param(path, id=path.name, marks=[pytest.mark.long] if path.processes > 1 else [])
        for path in paths
    ]


# For the sentences that several processes have to keep together.
with_processes = pytest.mark.parametrize("path", PATHS, indirect=True, ids=lambda path: path.name)

# For the sentences about bytes that pass by without our process.
in_kernel = pytest.mark.parametrize(
    "path", each(*(path for path in PATHS if path.in_kernel)), indirect=True
)

# For those about what the verdict does.
spliced = pytest.mark.parametrize(
    "path", each(*(path for path in PATHS if path.is_spliced)), indirect=True
)

# For what one session may hold: it lives in one process, however many there are.
one_process = pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path.processes == 1],
    indirect=True,
    ids=lambda path: path.name,
)
