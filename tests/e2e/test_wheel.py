# SPDX-License-Identifier: Apache-2.0
"""The wheel: what `make wheel` puts into it, and that it needs nothing of the machine.

It is installed into a fresh virtual environment and run where the compiler,
libbpf, libelf and the checkout are gone from the file system.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.utils import parse_wheel_filename

from .gateways import clean_environment
from .peers import connect
from .traffic import MIB, Stream, Task, receive, send_and_finish

if TYPE_CHECKING:
    from .conftest import StartGateway
    from .peers import EchoServer

CHECKOUT = Path(__file__).resolve().parents[2]

# Building and installing fetch packages; running does not.
pytestmark = pytest.mark.timeout(300)

# Run as `sh -c HIDDEN sh CHECKOUT SOCKGW run ...` in a mount namespace of its
# own: what a build takes from the machine is replaced by something empty, and
# $WHEEL_SOCKGW takes the place of the checkout's own SOCKGW.
HIDDEN = """
set -eu
empty=$(mktemp -d)
mount -t tmpfs none "$empty"
mkdir "$empty/dir"
for library in $(find /usr/lib /usr/local/lib -name 'libbpf.so*' -o -name 'libelf*.so*'); do
    mount --bind /dev/null "$(readlink -f "$library")"
done
for tool in clang llvm-strip cc gcc bpftool; do
    if path=$(command -v $tool); then mount --bind /dev/null "$(readlink -f "$path")"; fi
done
for directory in /usr/include "$1"; do
    mount --bind "$empty/dir" "$directory"
done
cd /
shift 2
exec env PATH="${WHEEL_SOCKGW%/*}" "$WHEEL_SOCKGW" "$@"
"""


def run(*command: str | Path, **environment: str) -> str:
    """Run a command in the checkout as a user would, outside of any `make`."""
    inherited = {
        name: value
        for name, value in clean_environment().items()
        if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=CHECKOUT,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `make wheel` has filled."""
    directory = tmp_path_factory.mktemp("dist")
    run("make", "wheel", f"DIST={directory}")
    return directory


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel: the one file in dist/."""
    (built,) = dist.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel in it, where nothing was compiled."""
    directory = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", directory)
    run(directory / "bin" / "pip", "install", "--only-binary=:all:", wheel)
    return directory


def test_the_wheel_serves_every_later_python_on_every_later_linux(wheel: Path) -> None:
    """One wheel serves CPython 3.10 and later, on any glibc as new as the builder's."""
    name, _, _, tags = parse_wheel_filename(wheel.name)
    assert name == "sockgw"
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp310", "abi3")}
    assert all(tag.platform.startswith("manylinux_2_") for tag in tags)
    shown = run(Path(sys.executable).with_name("auditwheel"), "show", wheel)
    assert any(f'platform tag: "{tag.platform}"' in " ".join(shown.split()) for tag in tags)


def test_the_wheel_holds_the_object_the_binding_and_its_libraries(wheel: Path) -> None:
    """The wheel holds the BPF object, the binding, libbpf and libelf, and no C."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"sockgw/_bpf/sockmap.bpf.o", "sockgw/_bpf/_binding.abi3.so"} <= set(names)
    libraries = sorted(name for name in names if name.startswith("sockgw.libs/") and ".so" in name)
    assert [name.removeprefix("sockgw.libs/")[:6] for name in libraries] == ["libbpf", "libelf"]
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_what_was_compiled_says_nothing_of_where(wheel: Path) -> None:
    """The object has the kernel's debug format and no other; no file names the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    bpf_object = contents["sockgw/_bpf/sockmap.bpf.o"]
    assert b".BTF.ext" in bpf_object
    assert b".debug_info" not in bpf_object
    assert not [name for name, data in contents.items() if os.fsencode(CHECKOUT) + b"/" in data]


def test_without_bpf_the_wheel_is_pure_python(tmp_path: Path) -> None:
    """SOCKGW_BUILD_BPF=0 makes a wheel for any machine, with nothing compiled in it."""
    pip = Path(sys.executable).with_name("pip")
    run(pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ".", SOCKGW_BUILD_BPF="0")
    (built,) = tmp_path.iterdir()
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".o"))]


@pytest.mark.usefixtures("root", "kernel_path")
def test_an_installed_wheel_splices_with_nothing_but_itself(
    installed: Path, start: StartGateway, echo: EchoServer
) -> None:
    """With no compiler, no libbpf and no checkout on the machine, the kernel moves the bytes."""
    gateway = start(
        echo.address,
        prefix=["unshare", "-m", "sh", "-c", HIDDEN, "sh", str(CHECKOUT)],
        environment={"WHEEL_SOCKGW": str(installed / "bin" / "sockgw"), "PYTHONPATH": ""},
        accel="splice",
    )
    maps = Path(f"/proc/{gateway.pid}/maps").read_text().splitlines()
    libraries = {line.split()[5] for line in maps if "libbpf" in line or "libelf" in line}
    assert len(libraries) == 2
    assert all(f"{installed}/" in path for path in libraries)

    sent = Stream(1, 8 * MIB)
    with connect(gateway.address) as client:
        sending = Task(send_and_finish, client, sent)
        assert receive(client) == sent.receipt()
        sending.result()
    assert gateway.metrics().value("gateway_ebpf_redirects_total", status="success") > 0
