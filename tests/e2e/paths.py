# SPDX-License-Identifier: Apache-2.0
"""The paths that the suite runs on: the one list to extend when a path is built."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


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
    def name(self) -> str:
        """The id that a test has on it."""
        return self.accel if self.processes == 1 else f"{self.accel}-{self.processes}"


# Every sentence of the suite holds on each of these, whatever the number of
# processes. `direct` joins here when it is built.
PATHS = (
    PathUnderTest(accel="off", label="relay", in_kernel=False),
    PathUnderTest(accel="splice", label="splice", in_kernel=True),
    PathUnderTest(accel="splice", label="splice", in_kernel=True, processes=2),
    PathUnderTest(accel="wire", label="wire", in_kernel=False),
)
# Named in the help, refused at start.
UNBUILT_PATHS = ("direct",)

# For the sentences about bytes that pass by without our process.
in_kernel = pytest.mark.parametrize(
    "path", [path for path in PATHS if path.in_kernel], indirect=True, ids=lambda path: path.name
)

# For what one session may hold: it lives in one process, however many there are.
one_process = pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path.processes == 1],
    indirect=True,
    ids=lambda path: path.name,
)
