# SPDX-License-Identifier: Apache-2.0
"""Loading: what the kernel refuses, how that reads, and that nothing is left of it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sockgw._bpf import features, libbpf
from sockgw.datapath import Datapath
from sockgw.errors import DatapathError, VerifierError
from sockgw.session import Way

from .leftovers import held
from .pairing import Pairing

if TYPE_CHECKING:
    import socket

pytestmark = pytest.mark.usefixtures("_splice_works")

BPF = Path(__file__).parents[2] / "bpf"
BAD_PROGRAM = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "sockmap.h"
char LICENSE[] SEC("license") = "Dual BSD/GPL";
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} words SEC(".maps");
SEC("sk_skb/stream_verdict")
int unchecked(struct __sk_buff *skb)
{
	__u32 key = 0;
	__u64 *word = bpf_map_lookup_elem(&words, &key);
	return *word;
}
"""


@pytest.fixture
def bad_object(tmp_path: Path) -> Path:
    """An object whose program the verifier refuses."""
    source, compiled = tmp_path / "bad.c", tmp_path / "bad.o"
    source.write_text(BAD_PROGRAM)
    command = ["clang", "-O2", "-g", "-target", "bpf", f"-I{BPF}", "-c", source, "-o", compiled]
    subprocess.run(command, check=True, timeout=60)
    return compiled


def test_closed_datapath_leaves_nothing(nothing_left: None, family: socket.AddressFamily) -> None:
    """A datapath that has moved bytes, and is closed, leaves no descriptor and no object."""
    loaded = Datapath.load(sessions=1, workers=3, cgroup=None)
    session_pair = Pairing(loaded, family)
    session_pair.pair()
    session_pair.client.send(b"moved")
    session_pair.expect(Way.TO_BACKEND, b"moved")
    session_pair.close()
    loaded.close()


def test_verifier_tells_why(nothing_left: None, bad_object: Path) -> None:
    """A program that the verifier refuses is an error with its log and the telling line."""
    opened = libbpf.Object(bad_object)
    with pytest.raises(VerifierError) as caught:
        opened.load()
    opened.close()
    assert caught.value.errno == errno.EACCES
    assert "invalid mem access" in str(caught.value)
    assert re.search(r"\(\d+ lines omitted\)$", str(caught.value))
    assert "\n" not in str(caught.value)
    assert "processed " in caught.value.log
    assert "return *word" in caught.value.log, "the log shows the source"


def test_log_of_one_load_is_not_that_of_the_next(bad_object: Path) -> None:
    """An error shows its own log only."""
    logs = []
    for _ in range(2):
        opened = libbpf.Object(bad_object)
        with pytest.raises(VerifierError) as caught:
            opened.load()
        opened.close()
        logs.append(caught.value.log)
    assert logs[0].count("invalid mem access") == logs[1].count("invalid mem access") == 1


def test_object_that_is_none(nothing_left: None, tmp_path: Path) -> None:
    """A file that is no BPF object is an error that names it."""
    path = tmp_path / "none.o"
    path.write_bytes(b"no object")
    with pytest.raises(DatapathError, match=r"open none\.o"):
        libbpf.Object(path)


def test_map_or_program_that_is_not_there(nothing_left: None, bad_object: Path) -> None:
    """What the object does not hold is an error that names it."""
    opened = libbpf.Object(bad_object)
    with pytest.raises(DatapathError, match="find missing: ENOENT"):
        opened.map("missing")
    with pytest.raises(DatapathError, match="missing: ENOENT"):
        opened.skip("missing")
    opened.close()


def test_missing_capabilities_are_named() -> None:
    """Without capabilities it is EPERM; the error says what is missing, and the way out."""
    program = (
        "from sockgw.datapath import Datapath\n"
        "try: Datapath.load(sessions=1, workers=1, cgroup=None)\n"
        "except OSError as error: print(error)\n"
    )
    drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
    done = subprocess.run(
        [*drop, sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "EPERM" in done.stdout, done
    assert "CAP_BPF" in done.stdout
    assert "--accel off" in done.stdout


def test_cgroup_that_is_none(nothing_left: None, tmp_path: Path) -> None:
    """A directory that is no cgroup v2 costs the statistics, and nothing else."""
    loaded = Datapath.load(sessions=1, workers=1, cgroup=tmp_path)
    assert not loaded.follows
    assert str(tmp_path) in str(loaded.cgroup_error)
    assert "sock_follow" in str(loaded.cgroup_error)
    loaded.close()


def test_cgroup_that_is_not_there(nothing_left: None, tmp_path: Path) -> None:
    """A cgroup path that does not exist costs the statistics, and nothing else."""
    loaded = Datapath.load(sessions=1, workers=1, cgroup=tmp_path / "missing")
    assert not loaded.follows
    assert loaded.cgroup_error.errno == errno.ENOENT
    loaded.close()


def test_attached_cgroup_is_left_alone_afterwards(nothing_left: None) -> None:
    """A datapath that was attached to a cgroup leaves it as it was."""
    loaded = Datapath.load(sessions=1, workers=1, cgroup=features.find_cgroup2(None))
    assert loaded.follows
    loaded.close()


def test_load_that_fails_half_way_leaves_nothing(
    nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that fails at its last step gives back what the steps before it took."""
    real = libbpf.Ring
    made = []

    def ring(size_bytes: int) -> libbpf.Ring:
        if made:
            raise DatapathError(errno.EMFILE, "create", "spill_ring")
        made.append(real(size_bytes))
        return made[0]

    monkeypatch.setattr(libbpf, "Ring", ring)
    with pytest.raises(DatapathError, match="EMFILE"):
        Datapath.load(sessions=1, workers=2, cgroup=None)


@pytest.mark.parametrize("map_name", ["sock_pair_map", "sock_map", "sock_slots"])
def test_map_that_cannot_be_made(
    nothing_left: None, monkeypatch: pytest.MonkeyPatch, map_name: str
) -> None:
    """A map that the kernel refuses to make is an error, and nothing is left."""
    real = libbpf.Object.resize

    def resize(bpf_object: libbpf.Object, name: str, entries: int) -> None:
        real(bpf_object, name, 0xFFFF_FFFF if name == map_name else entries)

    monkeypatch.setattr(libbpf.Object, "resize", resize)
    with pytest.raises(DatapathError):
        Datapath.load(sessions=1, workers=1, cgroup=None)


def test_descriptors_do_not_outlive_exec(datapath: Datapath) -> None:
    """A child process that is started inherits none of the kernel's objects."""
    fds, objects = held()
    assert objects
    kernel = [fd.split()[0] for fd in fds if "bpf" in fd]
    assert kernel
    assert not any(os.get_inheritable(int(fd)) for fd in kernel)
