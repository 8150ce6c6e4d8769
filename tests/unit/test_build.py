# SPDX-License-Identifier: Apache-2.0
"""build.py: what it hands to cffi, when it builds, and how it says that it cannot."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "sockgw_build", Path(__file__).parents[2] / "build.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build)


def test_an_integer_define_keeps_its_name_and_leaves_its_value_to_the_compiler() -> None:
    """`#define N (1 << 4)` becomes a constant whose value the C compiler supplies."""
    assert build.declarations("#define N (1 << 4) /* rooms */", "a.h") == "#define N ..."


def test_what_only_the_preprocessor_needs_is_left_out_line_for_line() -> None:
    """Guard, includes and pragmas become empty lines: cffi's errors name the header's own."""
    header = "#ifndef A_H\n#define A_H\n#include <stdint.h>\nint f(void);\n\n#endif"
    assert build.declarations(header, "a.h").splitlines() == ["", "", "", "int f(void);", ""]


@pytest.mark.parametrize(
    "line", ["#ifdef __bpf__", "#define MAX(a, b) a", "#define EMPTY", "#if 1", "#define A \\"]
)
def test_what_cffi_would_read_otherwise_than_c_is_refused(line: str) -> None:
    """A condition or a macro is refused by file, line and text."""
    with pytest.raises(build.BuildError, match=r"^bpf/a\.h:2: cffi cannot read '#"):
        build.declarations(f"int f(void);\n{line}\n", "bpf/a.h")


@pytest.mark.parametrize(("age_s", "stale"), [(-1, True), (0, False), (1, False)])
def test_an_output_older_than_a_source_is_stale(tmp_path: Path, age_s: int, stale: bool) -> None:
    """What is as new as all its sources is left alone."""
    source, output = tmp_path / "source", tmp_path / "output"
    for path, time_s in ((source, 1000), (output, 1000 + age_s)):
        path.touch()
        os.utime(path, (time_s, time_s))
    assert build.is_stale(output, [source]) is stale


def test_a_missing_output_is_stale(tmp_path: Path) -> None:
    """What was never built is built."""
    assert build.is_stale(tmp_path / "output", [])


def test_a_missing_tool_is_named_with_its_package_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without clang the build fails in one line: the tool, the package, and the way without."""
    monkeypatch.setenv("CLANG", "no-such-clang")
    monkeypatch.setattr("sys.argv", ["build.py", "--out", str(tmp_path)])
    assert build.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "clang" in line
    assert "apt-get install clang" in line
    assert "SOCKGW_BUILD_BPF=0" in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_listed_as_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--missing` prints what apt-get is to install, and builds nothing."""
    monkeypatch.setenv("LLVM_STRIP", "no-such-llvm-strip")
    monkeypatch.setattr("sys.argv", ["build.py", "--missing", "--out", str(tmp_path)])
    assert build.main() == 0
    assert "llvm" in capsys.readouterr().out.split()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_missing_where_nothing_is_to_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is up to date asks for no tool: it is used on machines that have none."""
    for name in (*build.OBJECTS, build.BINDING):
        (tmp_path / name).touch()
    monkeypatch.setenv("CLANG", "no-such-clang")
    monkeypatch.setattr("sys.argv", ["build.py", "--missing", "--out", str(tmp_path)])
    assert build.main() == 0
    assert capsys.readouterr().out.split() == []


def test_relay_only_leaves_no_earlier_build_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SOCKGW_BUILD_BPF=0 is relay only even where BPF was built before."""
    (tmp_path / build.BINDING).touch()
    (tmp_path / build.OBJECTS[0]).touch()
    monkeypatch.setenv("SOCKGW_BUILD_BPF", "0")
    monkeypatch.setattr("sys.argv", ["build.py", "--out", str(tmp_path)])
    assert build.main() == 0
    assert list(tmp_path.iterdir()) == []
