# SPDX-License-Identifier: Apache-2.0
"""The errors that sockgw raises, one class per way out.

Each message names the operation that failed, the object it failed on, and
what would put it right. The command line turns the class into an exit code;
nothing else depends on this hierarchy.
"""

from __future__ import annotations

import errno as errno_names
import os

# Python knows this number by its other name, the kernel's sources by this one.
_NAMES = {errno_names.EOPNOTSUPP: "EOPNOTSUPP"}


class SockgwError(Exception):
    """The root of the hierarchy; never raised itself."""


class ConfigError(SockgwError, ValueError):
    """A value the user gave is wrong: what, where, and what would be right."""


class UnsupportedKernelError(SockgwError):
    """This host cannot do what was asked for by name.

    Raised from probes only, so that `feature` and `needs` say what was looked
    for and found missing, never what merely failed.
    """

    def __init__(self, feature: str, needs: str) -> None:
        """Name the missing `feature` and what it `needs`."""
        super().__init__(f"{feature}: {needs}")
        self.feature = feature
        self.needs = needs


class DatapathError(SockgwError, OSError):
    """A call into the kernel's BPF machinery failed.

    `errno` is the kernel's, `operation` and `target` say what was done to
    what: ``update sock_map: EOPNOTSUPP``.
    """

    def __init__(self, errno: int, operation: str, target: str, hint: str = "") -> None:
        """Describe `operation` on `target` failing with `errno`."""
        self.operation = operation
        self.target = target
        self.hint = hint
        super().__init__(errno, os.strerror(errno))

    def __str__(self) -> str:
        """Return ``operation target: ERRNO (meaning)``, then the way out."""
        number = self.errno or 0
        name = _NAMES.get(number) or errno_names.errorcode.get(number, str(number))
        text = f"{self.operation} {self.target}: {name} ({self.strerror})"
        return f"{text}; {self.hint}" if self.hint else text


class VerifierError(DatapathError):
    """The kernel's verifier refused a program; `log` holds all that it said."""

    def __init__(self, errno: int, program: str, log: str) -> None:
        """Keep the verifier's `log` of `program`."""
        super().__init__(errno, "load", program)
        self.log = log

    def __str__(self) -> str:
        """Return the line of the log that tells, and how many it left out.

        The verifier's last word stands before its statistics; libbpf goes on
        behind them.
        """
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        ends = [index for index, line in enumerate(lines) if line.startswith("processed ")]
        if not ends or not ends[-1]:
            return super().__str__()
        return f"{super().__str__()}: {lines[ends[-1] - 1]} ({len(lines) - 1} lines omitted)"


class DialError(SockgwError, OSError):
    """A backend could not be reached: its address, and the reason."""

    def __init__(self, errno: int, backend: str, reason: str) -> None:
        """Name the `backend` and the `reason`, a word fit for a metric label."""
        self.backend = backend
        self.reason = reason
        super().__init__(errno, os.strerror(errno))

    def __str__(self) -> str:
        """Return ``dial 10.0.0.1:80: refused (Connection refused)``."""
        return f"dial {self.backend}: {self.reason} ({self.strerror})"
