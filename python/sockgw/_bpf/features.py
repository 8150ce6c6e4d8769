# SPDX-License-Identifier: Apache-2.0
"""What this host can do for a path, found out without changing anything.

Owns the probes: each answers supported, unsupported or inconclusive, with
what it found and the way out. `--accel auto`, `sockgw check` and the skips of
the tests are their three users. A probe reads files and tries an import; that
the kernel really splices, only a loaded datapath proves.
"""

from __future__ import annotations

import enum
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sockgw.errors import ConfigError, UnsupportedKernelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

BPF_OBJECT: Final = Path(__file__).with_name("sockmap.bpf.o")
KERNEL_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_BTF_MAGIC: Final = b"\xeb\x9f"  # struct btf_header, in the kernel's byte order


class Verdict(enum.Enum):
    """What a probe can say; only `SUPPORTED` lets a path be tried."""

    SUPPORTED = "supported"
    UNSUPPORTED = "unsupported"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Feature:
    """One probe's answer: `str()` is the line a user should read.

    `reason` is the label under which `gateway_fallbacks_total` counts the
    feature's absence; `remedy` is empty when nothing is wrong.
    """

    name: str
    verdict: Verdict
    detail: str
    remedy: str
    reason: str

    def __str__(self) -> str:
        """Return what was found, then the way out."""
        text = f"{self.name}: {self.detail}"
        return f"{text}; {self.remedy}" if self.remedy else text


@dataclass(frozen=True, slots=True)
class _Lack:
    """How the absence of a feature is counted, and what a user can do."""

    reason: str
    remedy: str


# First what no privilege can mend, then what one can: `first_obstacle` reports
# in this order.
_LACKS: Final = {
    "binding": _Lack(
        "no_binding",
        "install a sockgw wheel, or run `make` in the checkout (it needs clang and libbpf-dev)",
    ),
    "kernel": _Lack(
        "kernel_too_old",
        "boot a kernel that is >= 6.16, or 6.15.3+, 6.12.34+, 6.6.94+ or 6.1.142+: before these, "
        "a full send buffer duplicates bytes",
    ),
    "btf": _Lack("no_btf", "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y"),
    "capabilities": _Lack(
        "missing_capability",
        "run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON to the process (systemd: "
        "AmbientCapabilities=; setcap has no effect on a script); the relay needs none: "
        "--accel off",
    ),
    "tcx": _Lack(
        "no_tcx",
        "wire's program is attached by clsact filters: links would leave with the process",
    ),
    "raw_sockets": _Lack(
        "no_raw_sockets", "run as root, or grant CAP_NET_RAW: it ends sessions by a reset"
    ),
    "netfilter": _Lack(
        "netfilter",
        "packets of a session on wire do not pass INPUT, OUTPUT or NAT",
    ),
    "recv_trace": _Lack(
        "no_recv_trace",
        "boot a kernel that is >= 6.3: it tells when an application has read",
    ),
    "cgroup2": _Lack(
        "no_cgroup2",
        "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
    ),
}

# Without a cgroup2 only the sockops program is lost: splice works, its log
# lines lack the round-trip times. Without TCX wire has filters.
_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "direct": ("binding", "kernel", "btf", "recv_trace", "capabilities", "cgroup2"),
    "wire": ("binding", "kernel", "btf", "capabilities", "raw_sockets"),
    "splice": ("binding", "kernel", "btf", "capabilities"),
    "relay": (),
}


def _feature(name: str, verdict: Verdict, detail: str) -> Feature:
    lack = _LACKS[name]
    remedy = "" if verdict is Verdict.SUPPORTED else lack.remedy
    return Feature(name, verdict, detail, remedy, lack.reason)


def all(cgroup: Path | None = None) -> tuple[Feature, ...]:  # noqa: A001 -- read as features.all()
    """Run every probe, in the order in which their obstacles are reported.

    Raises ConfigError when a `cgroup` is given and is not one.
    """
    return (
        *(binding(), kernel(), btf(), tcx(), recv_trace()),
        *(capabilities(), raw_sockets(), cgroup2(cgroup)),
    )


def first_obstacle(path: str, features: Iterable[Feature]) -> Feature | None:
    """Return what keeps `path`, one of DESIGN.md's words, from working here."""
    return next(iter(obstacles(path, features)), None)


def obstacles(path: str, features: Iterable[Feature]) -> tuple[Feature, ...]:
    """Return everything that keeps `path` from working; nothing does: ()."""
    lacking = (f for f in features if f.verdict is not Verdict.SUPPORTED)
    return tuple(feature for feature in lacking if feature.name in _NEEDS[path])


def binding() -> Feature:
    """Probe for the compiled binding and the BPF object beside it."""
    try:
        importlib.import_module("sockgw._bpf._binding")
    except ImportError as error:
        return _feature("binding", Verdict.UNSUPPORTED, str(error))
    if not BPF_OBJECT.is_file():
        return _feature("binding", Verdict.UNSUPPORTED, f"{BPF_OBJECT} is missing")
    return _feature("binding", Verdict.SUPPORTED, f"{BPF_OBJECT.name} and libbpf are here")


# --- kernel


# Where the patch level of each upstream line reached the fix for duplicated
# bytes (KERNEL.md, 6); from 6.16 on every release has it.
_FIXED_IN: Final = {(6, 1): 142, (6, 6): 94, (6, 12): 34, (6, 15): 3}
_FIXED_SINCE: Final = (6, 16)
_TCX_FUNCTION: Final = b"\0tcx_link_attach\0"  # among the strings of BTF
_RECV_TRACE: Final = b"\0btf_trace_sock_recv_length\0"


def kernel(release: str | None = None) -> Feature:
    """Probe the running kernel's version, or judge `release` by itself."""
    if release is None:
        uname = os.uname()
        signature = Path("/proc/version_signature")  # Ubuntu's kernels only
        release, build = uname.release, uname.version
        ubuntu = signature.read_text(encoding="utf-8") if signature.is_file() else ""
    else:
        build = ubuntu = ""
    version = upstream_version(release, build, ubuntu)
    if version is None:
        return _feature("kernel", Verdict.INCONCLUSIVE, f"cannot read a version in {release!r}")
    named = ".".join(map(str, version))
    is_told = release.startswith(named.removesuffix(".0"))
    detail = release if is_told else f"{release}, upstream {named}"
    *line, patch = version
    fixed = tuple(line) >= _FIXED_SINCE or patch >= _FIXED_IN.get((line[0], line[1]), patch + 1)
    return _feature("kernel", Verdict.SUPPORTED if fixed else Verdict.UNSUPPORTED, detail)


def upstream_version(release: str, build: str, ubuntu: str) -> tuple[int, int, int] | None:
    """Return the upstream version of a kernel, or None if nothing names one.

    Distributions that name their kernels by ABI (6.1.0-37-amd64) hide the
    patch level in `release`; Debian tells it at the end of `build` (uname's
    version, /proc/version), Ubuntu in /proc/version_signature.
    """
    for text, pattern in (
        (build, r"#.*\bDebian (\d+)\.(\d+)\.(\d+)"),  # not the compiler's, before the '#'
        (ubuntu, r"(\d+)\.(\d+)\.(\d+)\s*$"),
        (release, r"^(\d+)\.(\d+)(?:\.(\d+))?"),
    ):
        if match := re.search(pattern, text):
            major, minor, patch = (int(number or 0) for number in match.groups())
            return major, minor, patch
    return None


def tcx() -> Feature:
    """Probe for links at an interface's ingress, by the function that makes them."""
    try:
        is_there = _TCX_FUNCTION in KERNEL_BTF.read_bytes()
    except OSError as error:
        return _feature("tcx", Verdict.INCONCLUSIVE, f"{KERNEL_BTF}: {error.strerror}")
    detail = "links at an interface's ingress" if is_there else "not in this kernel (6.6 has it)"
    return _feature("tcx", Verdict.SUPPORTED if is_there else Verdict.UNSUPPORTED, detail)


def btf() -> Feature:
    """Probe for the kernel's own type information, which CO-RE needs."""
    try:
        with KERNEL_BTF.open("rb") as file:
            magic = file.read(len(_BTF_MAGIC))
    except OSError as error:
        return _feature("btf", Verdict.UNSUPPORTED, f"{KERNEL_BTF}: {error.strerror}")
    if magic not in (_BTF_MAGIC, _BTF_MAGIC[::-1]):
        return _feature("btf", Verdict.UNSUPPORTED, f"{KERNEL_BTF} holds no BTF")
    return _feature("btf", Verdict.SUPPORTED, str(KERNEL_BTF))


def recv_trace(btf: Path = KERNEL_BTF) -> Feature:
    """Probe for the tracepoint sock_recv_length, by its name in the kernel's BTF."""
    try:
        is_there = _RECV_TRACE in btf.read_bytes()
    except OSError as error:
        return _feature("recv_trace", Verdict.INCONCLUSIVE, f"{btf}: {error.strerror}")
    if not is_there:
        return _feature("recv_trace", Verdict.UNSUPPORTED, "no sock_recv_length in BTF")
    return _feature("recv_trace", Verdict.SUPPORTED, "the kernel tells when recv() returns")


# --- rights


# Bits of CapEff, <linux/capability.h>.
_CAP_SYS_ADMIN: Final = 21
_CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}

# PROC_USER_INIT_INO, <linux/proc_ns.h>: bpf(2) asks for capabilities in the
# initial user namespace; root in any other gets EPERM.
_INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"


def capabilities() -> Feature:
    """Probe for the capabilities that loading, attaching and pairing take."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        namespace = os.readlink("/proc/self/ns/user")  # noqa: PTH115 -- not a path
    except OSError as error:
        return _feature("capabilities", Verdict.INCONCLUSIVE, f"/proc/self: {error.strerror}")
    missing = missing_capabilities(status)
    if missing:
        detail = f"missing {', '.join(missing)}"
    elif namespace != _INITIAL_USER_NAMESPACE:
        detail = "held in a user namespace only, where bpf(2) does not count them"
    else:
        detail = f"all that splice takes, as uid {os.geteuid()}"
        return _feature("capabilities", Verdict.SUPPORTED, detail)
    return _feature("capabilities", Verdict.UNSUPPORTED, detail)


def raw_sockets() -> Feature:
    """Probe for raw sockets, by opening one."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    except OSError as error:
        detail = f"open one: {error.strerror}"
        return _feature("raw_sockets", Verdict.UNSUPPORTED, detail)
    return _feature("raw_sockets", Verdict.SUPPORTED, "resets can be sent")


def missing_capabilities(status: str) -> tuple[str, ...]:
    """Return the names that CapEff lacks in `status`, a /proc/PID/status.

    CAP_SYS_ADMIN stands in for all of them (`bpf_token_capable`; 6.18: it
    alone loads, attaches to sock_map and the cgroup, and updates).
    """
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    if effective >> _CAP_SYS_ADMIN & 1:
        return ()
    return tuple(sorted(name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1))


# --- netfilter


def netfilter(ports: Collection[int]) -> Feature:
    """Probe for nftables rules that name one of `ports`, in what `nft` lists.

    Without the command nobody has made such rules with it. Rules that
    `nft` cannot put into words (iptables' own matches) are taken to name them.
    """
    nft = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if nft is None:
        return _feature("netfilter", Verdict.SUPPORTED, "no nft here to make rules with")
    try:
        listed = subprocess.run(
            [nft, "-j", "list", "ruleset"], capture_output=True, timeout=10, check=True
        )
        ruleset = json.loads(listed.stdout)["nftables"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        return _feature("netfilter", Verdict.INCONCLUSIVE, f"nft list ruleset: {error}")
    for rule in (item["rule"] for item in ruleset if "rule" in item):
        if any(_names_port(expression, ports) for expression in rule.get("expr", ())):
            where = f"table {rule['family']} {rule['table']}, chain {rule['chain']}"
            return _feature("netfilter", Verdict.UNSUPPORTED, f"{where} has a rule for our ports")
    return _feature("netfilter", Verdict.SUPPORTED, "no rule names our ports")


def _names_port(expression: Any, ports: Collection[int]) -> bool:  # noqa: ANN401 - JSON
    """Whether a rule's statement or expression (libnftables-json(5)) has one of `ports` in it."""
    if not isinstance(expression, dict):
        return False
    if "xt" in expression:
        return True
    match = expression.get("match", {})
    left = match.get("left", {})
    payload = left.get("payload", {}) if isinstance(left, dict) else {}
    if payload.get("field") not in {"sport", "dport"}:
        return False
    return match.get("op", "==") not in {"==", "in"} or _has(match.get("right"), ports)


def _has(value: Any, ports: Collection[int]) -> bool:  # noqa: ANN401 - JSON
    if isinstance(value, int):
        return value in ports
    if isinstance(value, dict) and "range" in value:
        first, last = value["range"]
        return any(first <= port <= last for port in ports)
    if isinstance(value, dict) and "set" in value:
        members = value["set"] if isinstance(value["set"], list) else [value["set"]]
        return any(_has(member, ports) for member in members)
    return True  # a named set, a map: what is in it changes


# --- cgroup2


def cgroup2(path: Path | None = None) -> Feature:
    """Probe for a cgroup2 to attach to: `path`, or the first one mounted.

    Raises ConfigError when `path` is not one: that is no lack of the host.
    """
    try:
        return _feature("cgroup2", Verdict.SUPPORTED, str(find_cgroup2(path)))
    except UnsupportedKernelError:
        return _feature("cgroup2", Verdict.UNSUPPORTED, "none in /proc/self/mounts")
    except OSError as error:
        return _feature("cgroup2", Verdict.INCONCLUSIVE, f"/proc/self: {error.strerror}")


def find_cgroup2(path: Path | None = None) -> Path:
    """Return a directory on cgroup2: `path`, or the first mount of one.

    Raises ConfigError when `path` is not one, UnsupportedKernelError when it
    is None and no cgroup2 is mounted.
    """
    mounted = mounts("cgroup2")
    if path is not None:
        try:
            if _device(path) in {device for device, _ in mounted} and path.is_dir():
                return path
            found = "not a directory on cgroup2"
        except OSError as error:
            found = error.strerror or str(error)
        where = ", ".join(str(point) for _, point in mounted) or "nowhere on this host"
        message = f"--cgroup {path}: {found}; cgroup2 is mounted at {where}"
        raise ConfigError(message)
    for device, point in mounted:
        if _is_at(device, point):
            return point
    raise UnsupportedKernelError("cgroup2", _LACKS["cgroup2"].remedy)


def own_cgroup2() -> Path:
    """Return the cgroup2 directory that this process is in.

    Raises UnsupportedKernelError when none is mounted, or this process's is not
    below the mount (a cgroup namespace shows another part of the tree).
    """
    mounted = find_cgroup2()
    own = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text("utf-8"), re.MULTILINE)
    path = mounted / own[1] if own else mounted
    if not path.is_dir():
        raise UnsupportedKernelError("cgroup2", f"mount the part of the tree that has {path}")
    return path


def mounts(filesystem: str) -> tuple[tuple[str, Path], ...]:
    """Return device and mount point of each `filesystem` that is mounted."""
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return mounts_in(table, filesystem)


def mounts_in(mountinfo: str, filesystem: str) -> tuple[tuple[str, Path], ...]:
    """Return device and mount point of each `filesystem` in a /proc/PID/mountinfo.

    proc_pid_mountinfo(5): ``36 35 0:31 / /point options [tags] - type ...``;
    the device is the `st_dev` of every file there, and blanks in a mount
    point are written in octal.
    """
    found = []
    for line in mountinfo.splitlines():
        mount, _, what = line.partition(" - ")
        if what.split(" ")[0] == filesystem:
            _, _, device, _, point, *_ = mount.split(" ")
            name = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
            found.append((device, Path(name)))
    return tuple(found)


def _device(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def _is_at(device: str, point: Path) -> bool:
    """Whether the mount is within reach: another may hide it, or a mode."""
    try:
        return _device(point) == device
    except OSError:
        return False
