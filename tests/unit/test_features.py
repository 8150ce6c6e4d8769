# SPDX-License-Identifier: Apache-2.0
"""The probes: what they read in the words of many hosts, and what they advise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sockgw._bpf import features
from sockgw._bpf.features import Feature, Verdict
from sockgw.errors import ConfigError, UnsupportedKernelError

DEBIAN_BUILD = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.140-1 (2025-05-22)"
DEBIAN_PROC_VERSION = (
    "Linux version 6.1.0-37-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian "
    f"12.2.0-14+deb12u1) 12.2.0, GNU ld (GNU Binutils for Debian) 2.40) {DEBIAN_BUILD}"
)
UBUNTU_SIGNATURE = "Ubuntu 6.8.0-60.63-generic 6.8.12\n"

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:10 master:2 - cgroup2 cgroup2 rw,nsdelegate
42 31 0:38 /a /mnt/my\040odd\134group\011s rw,relatime - cgroup2 none rw
43 31 0:40 / /mnt/cgroup2 rw,relatime - tmpfs cgroup2 rw
"""


@pytest.mark.parametrize(
    ("release", "build", "ubuntu", "version"),
    [
        ("6.18.44-fc-v657", "#1 SMP PREEMPT_DYNAMIC @0", "", (6, 18, 44)),
        ("6.12.34+", "#1 SMP", "", (6, 12, 34)),
        ("6.12.38+deb13-amd64", "#1 SMP Debian 6.12.38-1 (2025-07-16)", "", (6, 12, 38)),
        ("6.1.0-37-amd64", DEBIAN_BUILD, "", (6, 1, 140)),
        ("6.1.0-37-amd64", DEBIAN_PROC_VERSION, "", (6, 1, 140)),
        ("6.1.0-37-amd64", "#1 SMP built by hand with gcc-12", "", (6, 1, 0)),
        ("6.8.0-60-generic", "#63-Ubuntu SMP PREEMPT_DYNAMIC", UBUNTU_SIGNATURE, (6, 8, 12)),
        ("6.8.0-60-generic", "#63-Ubuntu SMP PREEMPT_DYNAMIC", "", (6, 8, 0)),
        ("6.6.87.2-microsoft-standard-WSL2", "#1 SMP", "", (6, 6, 87)),
        ("5.14.0-570.el9.x86_64", "#1 SMP PREEMPT_DYNAMIC", "", (5, 14, 0)),
        ("7.0", "", "", (7, 0, 0)),
        ("mainline", "#1 SMP", "", None),
    ],
)
def test_upstream_version(release, build, ubuntu, version):
    """A kernel's upstream version is read where its distribution wrote it."""
    assert features.upstream_version(release, build, ubuntu) == version


@pytest.mark.parametrize(
    ("release", "verdict"),
    [
        ("5.10.0", Verdict.UNSUPPORTED),
        ("6.1.141", Verdict.UNSUPPORTED),
        ("6.1.142", Verdict.SUPPORTED),
        ("6.2.999", Verdict.UNSUPPORTED),
        ("6.6.93", Verdict.UNSUPPORTED),
        ("6.6.94", Verdict.SUPPORTED),
        ("6.12.33", Verdict.UNSUPPORTED),
        ("6.12.34+", Verdict.SUPPORTED),
        ("6.14.11", Verdict.UNSUPPORTED),
        ("6.15.2", Verdict.UNSUPPORTED),
        ("6.15.3", Verdict.SUPPORTED),
        ("6.16", Verdict.SUPPORTED),
        ("6.18.44-fc-v657", Verdict.SUPPORTED),
        ("10.0.1", Verdict.SUPPORTED),
        ("6.8.0-60-generic", Verdict.UNSUPPORTED),
        ("mainline", Verdict.INCONCLUSIVE),
    ],
)
def test_kernel_gate(release, verdict):
    """A kernel is trusted from the release on in which its line got the fix."""
    feature = features.kernel(release)
    assert feature.verdict is verdict
    assert feature.reason == "kernel_too_old"
    assert (not feature.remedy) is (verdict is Verdict.SUPPORTED)


def test_hidden_patch_level_is_told(monkeypatch):
    """A kernel that is named by its ABI is judged, and reported, by its upstream version."""
    uname = os.uname_result(("Linux", "host", "6.1.0-37-amd64", DEBIAN_BUILD, "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)
    feature = features.kernel()
    assert feature.verdict is Verdict.UNSUPPORTED
    assert feature.detail == "6.1.0-37-amd64, upstream 6.1.140"


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        ("000001ffffffffff", ()),
        ("0000000000200000", ()),  # CAP_SYS_ADMIN
        ("000000c000001000", ()),
        ("000000c000000000", ("CAP_NET_ADMIN",)),
        ("0000008000001000", ("CAP_PERFMON",)),
        ("0000000000001000", ("CAP_BPF", "CAP_PERFMON")),
        ("0000000000000000", ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")),
    ],
)
def test_missing_capabilities(effective, missing):
    """CAP_SYS_ADMIN is enough; without it each capability that is missing is named."""
    status = f"Name:\tsockgw\nCapPrm:\t000001ffffffffff\nCapEff:\t{effective}\nCapBnd:\t0\n"
    assert features.missing_capabilities(status) == missing


def test_rights_in_a_user_namespace_do_not_count(monkeypatch):
    """Root of a user namespace is told that bpf(2) does not know it."""
    monkeypatch.setattr(features, "missing_capabilities", lambda _status: ())
    monkeypatch.setattr(os, "readlink", lambda _path: "user:[4026532201]")
    feature = features.capabilities()
    assert feature.verdict is Verdict.UNSUPPORTED
    assert "user namespace" in feature.detail


def test_mounts():
    """A mount is told by its file system, and blanks in its name are read back."""
    assert features.mounts_in(MOUNTINFO, "cgroup2") == (
        ("0:38", Path("/sys/fs/cgroup/unified")),
        ("0:38", Path("/mnt/my odd\\group\ts")),
    )


def test_a_path_that_is_no_cgroup2_is_a_usage_error(tmp_path):
    """`--cgroup` with any other directory says so, and where cgroup2 is."""
    with pytest.raises(ConfigError, match="not a directory on cgroup2; cgroup2 is mounted at"):
        features.find_cgroup2(tmp_path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        features.cgroup2(tmp_path / "absent")


def test_a_host_without_cgroup2_is_told_how_to_mount_it(monkeypatch):
    """Where none is mounted, the answer is the mount command."""
    monkeypatch.setattr(features, "mounts", lambda _filesystem: ())
    feature = features.cgroup2()
    assert feature.verdict is Verdict.UNSUPPORTED
    assert "mount -t cgroup2 none /sys/fs/cgroup/unified" in str(feature)
    with pytest.raises(UnsupportedKernelError, match="mount -t cgroup2"):
        features.find_cgroup2()


def test_a_hidden_mount_is_passed_over(monkeypatch, tmp_path):
    """A cgroup2 that another mount hides, or that is out of reach, is not chosen."""
    number = tmp_path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    mounts = (("0:1", tmp_path), (device, tmp_path / "absent"), (device, tmp_path))
    monkeypatch.setattr(features, "mounts", lambda _filesystem: mounts)
    assert features.find_cgroup2() == tmp_path


def test_a_binding_that_does_not_load_says_why(monkeypatch):
    """Without the compiled binding the probe tells how to get it."""
    monkeypatch.setitem(sys.modules, "sockgw._bpf._binding", None)
    feature = features.binding()
    assert feature.verdict is Verdict.UNSUPPORTED
    assert "_binding" in feature.detail
    assert "wheel" in feature.remedy


def test_btf_that_is_not_there(monkeypatch, tmp_path):
    """A kernel without BTF is told apart by the file that is missing."""
    monkeypatch.setattr(features, "KERNEL_BTF", tmp_path / "vmlinux")
    feature = features.btf()
    assert feature.verdict is Verdict.UNSUPPORTED
    assert "No such file" in feature.detail


@pytest.mark.parametrize(
    ("strings", "verdict"),
    [
        (b"\0tcx_link_attach\0", Verdict.SUPPORTED),
        (b"\0not_tcx_link_attach\0", Verdict.UNSUPPORTED),
        (None, Verdict.INCONCLUSIVE),
    ],
)
def test_tcx_by_what_the_kernel_has(monkeypatch, tmp_path, strings, verdict):
    """Links at an ingress are there if the function that makes them is, whatever the version."""
    btf = tmp_path / "vmlinux"
    if strings is not None:
        btf.write_bytes(b"\x9f\xeb" + strings)
    monkeypatch.setattr(features, "KERNEL_BTF", btf)
    feature = features.tcx()
    assert feature.verdict is verdict
    assert ("filters" in feature.remedy) is (verdict is not Verdict.SUPPORTED)


def probed(**verdicts: Verdict) -> tuple[Feature, ...]:
    names = (
        *("binding", "kernel", "btf", "tcx", "recv_trace"),
        *("capabilities", "raw_sockets", "cgroup2"),
    )
    verdict = {name: verdicts.get(name, Verdict.SUPPORTED) for name in names}
    return tuple(Feature(name, verdict[name], "", "", "") for name in names)


@pytest.mark.parametrize(
    ("path", "verdicts", "obstacle"),
    [
        ("splice", {}, None),
        ("splice", {"cgroup2": Verdict.UNSUPPORTED}, None),
        ("splice", {"kernel": Verdict.INCONCLUSIVE}, "kernel"),
        ("splice", {"btf": Verdict.UNSUPPORTED, "capabilities": Verdict.UNSUPPORTED}, "btf"),
        ("relay", {"binding": Verdict.UNSUPPORTED, "kernel": Verdict.UNSUPPORTED}, None),
        ("wire", {}, None),
        ("wire", {"tcx": Verdict.UNSUPPORTED}, None),
        ("wire", {"raw_sockets": Verdict.UNSUPPORTED}, "raw_sockets"),
        ("wire", {"capabilities": Verdict.UNSUPPORTED}, "capabilities"),
        ("direct", {}, None),
        ("direct", {"recv_trace": Verdict.UNSUPPORTED, "tcx": Verdict.UNSUPPORTED}, "recv_trace"),
        ("direct", {"cgroup2": Verdict.UNSUPPORTED}, "cgroup2"),
    ],
)
def test_first_obstacle(path, verdicts, obstacle):
    """Each path is kept back by what it needs and by nothing else; the relay by nothing."""
    found = features.first_obstacle(path, probed(**verdicts))
    assert (found.name if found else None) == obstacle


def test_an_obstacle_is_one_line_with_the_way_out():
    """An obstacle reads: what, what was found, what to do."""
    feature = Feature("btf", Verdict.UNSUPPORTED, "none found", "boot another", "no_btf")
    assert str(feature) == "btf: none found; boot another"
    assert str(Feature("btf", Verdict.SUPPORTED, "here", "", "no_btf")) == "btf: here"


def test_every_probe_answers_on_this_host():
    """Wherever the tests run, every probe answers, and says what to do where it is not yes."""
    for feature in features.all():
        assert feature.detail
        assert bool(feature.remedy) is (feature.verdict is not Verdict.SUPPORTED)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ({"match": {"op": "==", "left": {"payload": {"field": "dport"}}, "right": 8080}}, True),
        ({"match": {"op": "==", "left": {"payload": {"field": "dport"}}, "right": 22}}, False),
        ({"match": {"op": "!=", "left": {"payload": {"field": "sport"}}, "right": 22}}, True),
        (
            {"match": {"left": {"payload": {"field": "dport"}}, "right": {"range": [1, 9000]}}},
            True,
        ),
        ({"match": {"left": {"payload": {"field": "dport"}}, "right": {"set": [22, 80]}}}, False),
        ({"match": {"left": {"payload": {"field": "dport"}}, "right": {"set": [22, 8080]}}}, True),
        ({"match": {"left": {"payload": {"field": "dport"}}, "right": "@ports"}}, True),
        ({"match": {"left": {"meta": {"key": "iifname"}}, "right": "eth0"}}, False),
        ({"xt": {"type": "match", "name": "multiport"}}, True),
        ({"accept": None}, False),
        ("accept", False),
    ],
)
def test_rules_that_name_a_port(expression, names):
    """A rule names our ports by number, range, set, or by what nft cannot put into words."""
    assert features._names_port(expression, {8080, 9000}) is names
