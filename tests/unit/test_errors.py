# SPDX-License-Identifier: Apache-2.0
"""The errors: each names the operation, the object and the way out, in one line."""

from __future__ import annotations

import errno

import pytest

from sockgw.errors import (
    ConfigError,
    DatapathError,
    DialError,
    SockgwError,
    UnsupportedKernelError,
    VerifierError,
)

# As libbpf 1.1 writes it.
LOG = """\
libbpf: prog 'unchecked': BPF program load failed: Permission denied
libbpf: prog 'unchecked': -- BEGIN PROG LOAD LOG --
0: R1=ctx() R10=fp0
; return *word; @ bad.c:17
7: (79) r0 = *(u64 *)(r0 +0)
R0 invalid mem access 'map_value_or_null'
processed 7 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
-- END PROG LOAD LOG --
libbpf: prog 'unchecked': failed to load: -13
libbpf: failed to load object 'bad.o'
"""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("--listen: no port"), "--listen: no port"),
        (
            UnsupportedKernelError("--accel wire", "not built in this version"),
            "--accel wire: not built in this version",
        ),
        (
            DatapathError(errno.EOPNOTSUPP, "update", "sock_map"),
            "update sock_map: EOPNOTSUPP (Operation not supported)",
        ),
        (
            DatapathError(errno.EPERM, "load", "sockmap.bpf.o", "it needs CAP_BPF"),
            "load sockmap.bpf.o: EPERM (Operation not permitted); it needs CAP_BPF",
        ),
        (DatapathError(524, "load", "a.o"), "load a.o: 524 (Unknown error 524)"),
        (
            DialError(errno.ECONNREFUSED, "10.0.0.1:80", "refused"),
            "dial 10.0.0.1:80: refused (Connection refused)",
        ),
        (
            VerifierError(errno.EACCES, "a.o", ""),
            "load a.o: EACCES (Permission denied)",
        ),
    ],
)
def test_message(error: SockgwError, text: str) -> None:
    """An error's text is its operation, object and errno, and the way out if there is one."""
    assert str(error) == text


def test_verifier_error_tells_the_line_that_matters() -> None:
    """Of the verifier's log the last line of its own is shown, and how many are not."""
    error = VerifierError(errno.EACCES, "bad.o", LOG)
    assert str(error) == (
        "load bad.o: EACCES (Permission denied): R0 invalid mem access 'map_value_or_null'"
        f" ({len(LOG.splitlines()) - 1} lines omitted)"
    )
    assert error.log == LOG


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("wrong"), ValueError),
        (DatapathError(errno.EBUSY, "update", "sock_map"), OSError),
        (VerifierError(errno.EACCES, "a.o", LOG), DatapathError),
        (DialError(errno.ECONNREFUSED, "a:1", "refused"), OSError),
    ],
)
def test_errors_are_also_what_python_calls_them(error: SockgwError, kind: type) -> None:
    """Whoever catches Python's own class catches these, with their errno."""
    assert isinstance(error, kind)
    assert isinstance(error, SockgwError)
    if isinstance(error, OSError):
        assert error.errno
        assert error.strerror


def test_unsupported_kernel_is_no_oserror() -> None:
    """What was looked for and not found is told apart from what was tried and failed."""
    error = UnsupportedKernelError("BTF", "CONFIG_DEBUG_INFO_BTF")
    assert not isinstance(error, OSError)
    assert (error.feature, error.needs) == ("BTF", "CONFIG_DEBUG_INFO_BTF")


def test_hierarchy_has_one_root() -> None:
    """Every error of the package can be caught by the one class."""
    for kind in (ConfigError, UnsupportedKernelError, DatapathError, VerifierError, DialError):
        assert issubclass(kind, SockgwError)
