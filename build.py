# SPDX-License-Identifier: Apache-2.0
"""The one builder: clang makes the BPF object, cffi and the C compiler the binding.

It is hatchling's build hook (``pip install``, ``pip wheel``) and a script
(``python build.py``), and both leave the same two files beside the Python
that loads them, so that an editable install finds them too. A file that is
newer than everything it is made from is left alone.

Only the standard library is imported at the top: ``python build.py --missing``
runs on a machine that has nothing else yet.

The binding is compiled here rather than by cffi's own ``compile()``, which
needs setuptools: one call of the C compiler is all that it takes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
BPF = ROOT / "bpf"
PACKAGE = ROOT / "python" / "sockgw" / "_bpf"
C_SOURCES = sorted(PACKAGE.glob("*.c"))
OBJECTS = ("sockmap.bpf.o", "wire.bpf.o", "direct.bpf.o")
BINDING = "_binding.abi3.so"

# The oldest Python whose stable ABI the binding asks for: requires-python.
ABI3_HEX = "0x030a0000"
ABI3_TAG = "cp310-abi3"

# The kernel's own names, as its uapi headers spell them on every architecture
# that has eBPF: cffi compares pointers to struct fields with the compiler's.
KERNEL_TYPES = """
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
"""


class BuildError(Exception):
    """What could not be built, and the way out, in one line."""


class Need(NamedTuple):
    """Something that the build takes from the machine."""

    name: str
    package: str  # Debian's and Ubuntu's
    is_met: bool


def tool(name: str) -> str:
    """Return the command for the tool `name`: CLANG, LLVM_STRIP or CC, if set."""
    return os.environ.get(name.upper().replace("-", "_")) or name


def needs() -> tuple[Need, ...]:
    """Look for everything the build takes from the machine."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python_h = Path(sysconfig.get_path("include"), "Python.h")
    return (
        Need("clang", "clang", shutil.which(tool("clang")) is not None),
        Need("llvm-strip", "llvm", shutil.which(tool("llvm-strip")) is not None),
        Need("cc", "gcc", shutil.which(tool("cc")) is not None),
        Need("C library headers", "libc6-dev", compiles("#include <stdio.h>")),
        Need(
            "libbpf 1.0 or newer",
            "libbpf-dev",
            compiles(
                "#include <bpf/libbpf.h>",
                "#if LIBBPF_MAJOR_VERSION < 1",
                "#error",
                "#endif",
            ),
        ),
        Need(f"Python.h of {python}", f"{python}-dev", python_h.is_file()),
    )


def compiles(*lines: str) -> bool:
    """Tell whether the C compiler, if there is one, takes these lines."""
    try:
        done = subprocess.run(
            [tool("cc"), "-fsyntax-only", "-xc", "-"],
            input="\n".join((*lines, "")),
            text=True,
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return done.returncode == 0


def is_wanted() -> bool:
    """Tell whether BPF is to be built: unless SOCKGW_BUILD_BPF=0 (relay only)."""
    return os.environ.get("SOCKGW_BUILD_BPF", "1") != "0"


def is_stale(output: Path, sources: Iterable[Path]) -> bool:
    """Tell whether `output` is missing, or older than one of its `sources`."""
    try:
        built_ns = output.stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return any(source.stat().st_mtime_ns > built_ns for source in sources)


def stale_outputs(out: Path) -> dict[Path, Callable[[Path], None]]:
    """Return what in `out` is to be built, with the function that builds each."""
    shared = [Path(__file__), BPF / "sockmap.h", BPF / "wire.h", BPF / "direct.h"]
    headers = PACKAGE.glob("*.h")
    stale: dict[Path, Callable[[Path], None]] = {}
    for name in OBJECTS:
        if is_stale(out / name, [*shared, source_of(name), BPF / "vmlinux.h"]):
            stale[out / name] = compile_object
    if is_stale(out / BINDING, [*shared, *headers, *C_SOURCES]):
        stale[out / BINDING] = compile_binding
    return stale


def build(out: Path = PACKAGE) -> None:
    """Bring the object and the binding in `out` up to date.

    Raises BuildError; what could not be built anew is then as it was.
    """
    stale = stale_outputs(out)
    if stale:
        check_machine()
        out.mkdir(parents=True, exist_ok=True)
    for output, compile_into in stale.items():
        # In the same directory, so that the rename into place is atomic, and a
        # gateway that has the old file mapped keeps it.
        with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as scratch:
            new = Path(scratch, output.name)
            compile_into(new)
            new.replace(output)
        print(f"built {output}", flush=True)


def check_machine() -> None:
    """Raise BuildError when the machine lacks what the build takes."""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError(
            "the binding needs CPython's stable ABI, which this Python does not have: "
            "use CPython, or SOCKGW_BUILD_BPF=0 for the relay only"
        )
    unmet = [need for need in needs() if not need.is_met]
    if unmet:
        names = ", ".join(need.name for need in unmet)
        packages = " ".join(need.package for need in unmet)
        raise BuildError(
            f"missing: {names}; apt-get install {packages}, "
            "or set SOCKGW_BUILD_BPF=0 for the relay only"
        )


def source_of(name: str) -> Path:
    """Return what the BPF object `name` is made from."""
    return BPF / Path(name).with_suffix(".c")


def compile_object(output: Path) -> None:
    """Compile the BPF program into `output`, with BTF and without DWARF."""
    run(
        tool("clang"),
        *("-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror"),
        *("-I", "bpf", f"-ffile-prefix-map={ROOT}=."),
        *("-c", str(source_of(output.name).relative_to(ROOT)), "-o", str(output)),
    )
    run(tool("llvm-strip"), "-g", str(output))


def compile_binding(output: Path) -> None:
    """Generate the binding's C and compile it with the shim into `output`."""
    generated = output.with_name("_binding.c")
    generate_binding(generated)
    package = PACKAGE.relative_to(ROOT)
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    run(
        tool("cc"),
        *("-shared", "-fPIC", "-fvisibility=hidden", "-O2", "-Wall", "-Werror"),
        *(f"-DPy_LIMITED_API={ABI3_HEX}", f"-ffile-prefix-map={generated.parent}=."),
        *(f"-I{include}" for include in (BPF.relative_to(ROOT), package, *sorted(includes))),
        *(str(generated), *(str(source.relative_to(ROOT)) for source in C_SOURCES), "-lbpf"),
        *("-o", str(output)),
    )


def generate_binding(output: Path) -> None:
    """Have cffi write the C that Python calls."""
    import cffi  # noqa: PLC0415 - `--missing` runs without it

    ffi = cffi.FFI()
    ffi.cdef(KERNEL_TYPES)
    for header in (BPF / "sockmap.h", BPF / "direct.h", PACKAGE / "cdef.h"):
        ffi.cdef(declarations(header.read_text(), str(header.relative_to(ROOT))))
    ffi.set_source("sockgw._bpf._binding", '#include "shim.h"', compiler_verbose=False)
    ffi.emit_c_code(str(output))


def declarations(header: str, name: str) -> str:
    """Turn a C header into what cffi's parser takes, line for line.

    An integer ``#define`` keeps its name and leaves its value to the compiler.
    The include guard, includes and pragmas go. Anything else that only a
    preprocessor could answer is refused (BuildError): Python and C would come
    to read different declarations.
    """
    kept = []
    guard = re.search(r"^#ifndef (\w+)\n#define \1\n", header, re.MULTILINE)
    dropped = {f"#ifndef {guard[1]}", f"#define {guard[1]}"} if guard else set()
    for number, line in enumerate(header.splitlines(), 1):
        if not line.startswith("#"):
            kept.append(line)
        elif constant := re.match(r"#define (\w+) +[^\s/].*(?<!\\)$", line):
            kept.append(f"#define {constant[1]} ...")
        elif line in dropped or re.match(r"#(include|pragma|endif)\b", line):
            kept.append("")
        else:
            raise BuildError(f"{name}:{number}: cffi cannot read {line!r}")
    return "\n".join(kept)


def run(*command: str) -> None:
    """Run a compiler in the checkout; its own messages say what is wrong."""
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed; its messages are above")


def remove(out: Path = PACKAGE) -> None:
    """Remove what an earlier build left, so that relay only is what it says."""
    for name in (*OBJECTS, BINDING):
        (out / name).unlink(missing_ok=True)


def get_build_hook() -> type[BuildHookInterface[Any]]:
    """Return hatchling's build hook; hatchling looks for this name."""
    from hatchling.builders.hooks.plugin.interface import (  # noqa: PLC0415 - a script needs none
        BuildHookInterface,
    )

    class BuildHook(BuildHookInterface[Any]):
        """Build before hatchling packs the wheel, and tag the wheel for what is in it."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Add what was built to the wheel; an editable install uses it in place."""
            if not is_wanted():
                if version == "editable":
                    remove()
                return
            try:
                build()
            except BuildError as error:
                raise SystemExit(f"sockgw: {error}") from None
            platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
            build_data["pure_python"] = False
            build_data["tag"] = f"{ABI3_TAG}-{platform}"
            for name in (*OBJECTS, BINDING):
                build_data["force_include"][str(PACKAGE / name)] = f"sockgw/_bpf/{name}"

    return BuildHook


def main() -> int:
    """Build, or list what is missing to build."""
    parser = argparse.ArgumentParser(description="Build the BPF object and the binding.")
    parser.add_argument(
        "--out", type=Path, default=PACKAGE, metavar="DIR", help="where to (default: %(default)s)"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="build nothing; print the Debian packages that a build now would lack",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    if options.missing:
        unmet = [need.package for need in needs() if not need.is_met] if stale_outputs(out) else []
        print(*unmet)
        return 0
    if not is_wanted():
        remove(out)
        return 0
    try:
        build(out)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
