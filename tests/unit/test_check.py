# SPDX-License-Identifier: Apache-2.0
"""`sockgw check`: what it concludes from probes and proof, and how it says so.

The probes and the proof are stood in for; what they find on a real kernel is
for the tests in `kernel` and `e2e`.
"""

from __future__ import annotations

import errno
import json

import pytest

from sockgw import check
from sockgw._bpf import features
from sockgw._bpf.features import Feature, Verdict
from sockgw.errors import ConfigError, DatapathError, UnsupportedKernelError

NAMES = (
    *("binding", "kernel", "btf", "tcx", "recv_trace"),
    *("capabilities", "raw_sockets", "cgroup2"),
)


@pytest.fixture
def host(monkeypatch):
    """A host that has everything; called, it lacks the features named."""

    def lack(*names):
        probed = tuple(
            Feature(name, Verdict.UNSUPPORTED, "is missing", f"get {name}", "")
            if name in names
            else Feature(name, Verdict.SUPPORTED, f"/{name}", "", "")
            for name in NAMES
        )
        monkeypatch.setattr(features, "all", lambda _cgroup: probed)

    lack()
    monkeypatch.setattr(check, "prove_splice", lambda _cgroup: "")
    monkeypatch.setattr(check, "prove_wire", lambda: None)
    monkeypatch.setattr(check, "prove_direct", lambda _cgroup: "")
    return lack


@pytest.fixture
def prove(monkeypatch):
    """Replace the proof; what it was asked is kept in `asked`."""

    def replace(outcome):
        def proof(cgroup):
            replace.asked = cgroup
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(check, "prove_splice", proof)

    return replace


def lines(capsys):
    """Return the lines that were printed, by their first word."""
    return {
        line.split(maxsplit=1)[0]: line for line in capsys.readouterr().out.splitlines() if line
    }


def test_a_host_that_has_everything_splices(host, capsys):
    """When every probe and the proof pass, splice and relay work, and the exit code is 0."""
    assert check.main(None, as_json=False) == 0
    printed = lines(capsys)
    assert printed["splice"].split() == ["splice", "works"]
    assert printed["relay"].split() == ["relay", "works"]


@pytest.mark.parametrize("missing", ["binding", "kernel", "btf", "capabilities"])
def test_what_splice_lacks_is_named_with_the_way_out(host, prove, missing, capsys):
    """A missing feature leaves the relay, exit code 3, and a line with reason and remedy."""
    host(missing)
    prove(AssertionError("there is nothing to prove"))
    assert check.main(None, as_json=False) == 3
    printed = lines(capsys)
    assert f"does not work {missing}: is missing; get {missing}" in printed["splice"]
    assert printed["relay"].split() == ["relay", "works"]
    assert "unsupported" in printed[missing]


def test_everything_that_splice_lacks_is_named(host):
    """Of several obstacles each is told, so that one visit is enough."""
    host("btf", "capabilities")
    splice = check.examine(None).paths[2]
    assert splice.notes == (
        "btf: is missing; get btf",
        "capabilities: is missing; get capabilities",
    )


def test_without_cgroup2_splice_works_and_says_what_it_lacks(host, prove, capsys):
    """No cgroup2 costs the sockops program only."""
    host("cgroup2")
    prove("")
    assert check.main(None, as_json=False) == 0
    assert prove.asked is None
    assert "without round-trip times" in (splice := lines(capsys)["splice"])
    assert "get cgroup2" in splice


def test_a_cgroup_that_refuses_the_program_is_told(host, prove, capsys):
    """A sockops program that cannot be attached is a note, not a failure."""
    prove("attach sock_follow to /cgroup2: EPERM (Operation not permitted)")
    assert check.main(None, as_json=False) == 0
    assert str(prove.asked) == "/cgroup2"
    assert "attach sock_follow to /cgroup2: EPERM" in lines(capsys)["splice"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DatapathError(errno.EPERM, "load", "it", "a way out"), "not permitted); a way out"),
        (DatapathError(errno.EINVAL, "load", "sockmap.bpf.o"), "load sockmap.bpf.o: EINVAL"),
        (TimeoutError("timed out"), "timed out; sockgw's own proof failed"),
        (OSError(errno.EIO, "other bytes came through"), "other bytes came through; sockgw's"),
    ],
)
def test_a_proof_that_fails_outweighs_the_probes(host, prove, error, told, capsys):
    """Where every probe passes and the kernel still does not splice, the verdict is no."""
    prove(error)
    assert check.main(None, as_json=False) == 3
    assert told in lines(capsys)["splice"]


@pytest.mark.parametrize(
    "missing", ["binding", "kernel", "btf", "recv_trace", "capabilities", "cgroup2"]
)
def test_what_direct_lacks_is_named_with_the_way_out(host, monkeypatch, missing, capsys):
    """A missing feature takes direct away, and says what would bring it back."""
    host(missing)
    monkeypatch.setattr(check, "prove_direct", lambda _: pytest.fail("there is nothing to prove"))
    check.main(None, as_json=False)
    assert f"does not work {missing}: is missing; get {missing}" in lines(capsys)["direct"]


def test_what_applications_do_without_on_direct_is_told(host, monkeypatch, capsys):
    """Where direct works in part the verdict is yes, with a note."""
    monkeypatch.setattr(check, "prove_direct", lambda _: "without FIONREAD")
    check.main(None, as_json=False)
    assert lines(capsys)["direct"].split() == ["direct", "works", "without", "FIONREAD"]


def test_a_kernel_that_bounds_nothing_has_no_direct(host, monkeypatch, capsys):
    """Where the proof finds the kernel wanting, the verdict is no, with the way out."""

    def fail(_cgroup):
        raise UnsupportedKernelError("direct", "boot another")

    monkeypatch.setattr(check, "prove_direct", fail)
    assert check.main(None, as_json=False) == 0
    assert lines(capsys)["direct"].endswith("direct: boot another")


@pytest.mark.parametrize("missing", ["binding", "btf", "capabilities", "raw_sockets"])
def test_what_wire_lacks_is_named_with_the_way_out(host, monkeypatch, missing, capsys):
    """A missing feature takes the wire away, and says what would bring it back."""
    host(missing)
    monkeypatch.setattr(check, "prove_wire", lambda: pytest.fail("there is nothing to prove"))
    check.main(None, as_json=False)
    assert f"does not work {missing}: is missing; get {missing}" in lines(capsys)["wire"]


def test_a_session_that_does_not_switch_outweighs_the_probes(host, monkeypatch, capsys):
    """Where every probe passes and no session switches, the verdict on wire alone is no."""

    def fail():
        raise OSError(errno.EIO, "it did not")

    monkeypatch.setattr(check, "prove_wire", fail)
    assert check.main(None, as_json=False) == 0
    assert "it did not; sockgw's own proof failed" in lines(capsys)["wire"]


def test_json_has_the_documented_shape(host, capsys):
    """`--json` prints the report's fields under their names."""
    host("btf")
    assert check.main(None, as_json=True) == 3
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["versions", "features", "bpffs", "open_files", "paths"]
    assert list(report["versions"]) == ["sockgw", "python", "kernel", "libbpf", "libelf"]
    assert [feature["name"] for feature in report["features"]] == list(NAMES)
    assert report["features"][2] == {
        "name": "btf",
        "verdict": "unsupported",
        "detail": "is missing",
        "remedy": "get btf",
        "reason": "",
    }
    assert report["paths"][2:] == [
        {"path": "splice", "works": False, "notes": ["btf: is missing; get btf"]},
        {"path": "relay", "works": True, "notes": []},
    ]


def test_a_cgroup_that_is_none_is_a_usage_error(tmp_path):
    """`--cgroup` with another directory is refused before anything is tried."""
    with pytest.raises(ConfigError, match="not a directory on cgroup2"):
        check.main(tmp_path, as_json=False)
