# SPDX-License-Identifier: Apache-2.0
"""bpf/vmlinux.h against the kernel that runs these tests, and against its one user.

The header is written by hand: a field that it declares wrongly would be read
wrongly, and one that nobody reads would only make it longer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pycparser import CParser, c_ast

from sockgw._bpf import features

BPF = Path(__file__).parents[2] / "bpf"
HEADER = BPF / "vmlinux.h"
SOURCE = BPF / "sockmap.bpf.c"

# What pycparser says of a type and what BTF says of it, brought to one form:
# ("int", size, is_signed), ("pointer", to), ("array", length, of), ("struct", name).
Type = tuple[Any, ...]

QUALIFIERS = {"TYPEDEF", "CONST", "VOLATILE", "RESTRICT", "TYPE_TAG"}
INTEGER_SIZES = {"_Bool": 1, "char": 1, "short": 2, "int": 4, "long": 8, "long long": 8}


# --- the header, as it declares


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)


def declarations() -> list[c_ast.Node]:
    """Parse the header; of its directives only the pragmas mean anything."""
    text = without_comments(HEADER.read_text())
    return list(CParser().parse(re.sub(r"^#(?!pragma).*", "", text, flags=re.MULTILINE)).ext)


DECLARATIONS = declarations()
TYPEDEFS = {node.name: node.type for node in DECLARATIONS if isinstance(node, c_ast.Typedef)}
RECORDS = {
    node.type.name: node.type
    for node in DECLARATIONS
    if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Struct)
}
ENUMERATORS = {
    item.name: (node.type.name, int(item.value.value, 0))
    for node in DECLARATIONS
    if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Enum)
    for item in node.type.values.enumerators
}


def declared_fields(record: c_ast.Node) -> dict[str, c_ast.Decl]:
    """Return the fields of a record by name, those of anonymous members too."""
    fields = {}
    for field in record.decls or ():
        if field.name is None:
            fields |= declared_fields(field.type)
        else:
            fields[field.name] = field
    return fields


FIELDS = {
    f"{name}.{field}": declaration
    for name, record in RECORDS.items()
    for field, declaration in declared_fields(record).items()
}


def declared_type(node: c_ast.Node) -> Type:
    match node:
        case c_ast.TypeDecl():
            return declared_type(node.type)
        case c_ast.IdentifierType(names=[name]) if name in TYPEDEFS:
            return declared_type(TYPEDEFS[name])
        case c_ast.IdentifierType(names=["void"]):
            return ("void",)
        case c_ast.IdentifierType(names=names):
            size = INTEGER_SIZES[" ".join(n for n in names if n not in {"signed", "unsigned"})]
            return ("int", size, "unsigned" not in names and names != ["_Bool"])
        case c_ast.PtrDecl():
            return ("pointer", declared_type(node.type))
        case c_ast.ArrayDecl():
            return ("array", int(node.dim.value, 0), declared_type(node.type))
        case c_ast.Struct() | c_ast.Union() | c_ast.Enum():
            return (type(node).__name__.lower(), node.name)
    raise NotImplementedError(node)


def identifiers(node: c_ast.Node) -> set[str]:
    """Return the names of the types that a declaration is made of."""
    names = set(node.names) if isinstance(node, c_ast.IdentifierType) else set()
    return names.union(*(identifiers(child) for child in node))


# --- the kernel, as it is


class Btf:
    """The running kernel's types."""

    def __init__(self) -> None:
        bpftool = shutil.which("bpftool", path=f"{os.environ['PATH']}:/usr/sbin")
        assert bpftool, "bpftool is not installed"
        dump = subprocess.run(
            [bpftool, "-j", "btf", "dump", "file", features.KERNEL_BTF],
            check=True,
            capture_output=True,
            timeout=60,
        )
        types = json.loads(dump.stdout)["types"]
        self.by_id = {item["id"]: item for item in types}
        self.by_name = {(item["kind"], item["name"]): item for item in types}
        self.enumerators = {
            value["name"]: (item["name"], value["val"])
            for item in types
            if item["kind"] in {"ENUM", "ENUM64"}
            for value in item.get("values", ())
        }

    def resolve(self, type_id: int) -> dict[str, Any]:
        """Follow typedefs and qualifiers to the type itself."""
        item = self.by_id[type_id]
        return self.resolve(item["type_id"]) if item["kind"] in QUALIFIERS else item

    def type(self, type_id: int) -> Type:
        if type_id == 0:
            return ("void",)
        item = self.resolve(type_id)
        match item["kind"]:
            case "INT":
                return ("int", item["size"], item["encoding"] == "SIGNED")
            case "PTR":
                return ("pointer", self.type(item["type_id"]))
            case "ARRAY":
                return ("array", item["nr_elems"], self.type(item["type_id"]))
            case "FWD":
                return ("struct", item["name"])
            case kind:
                return (kind.lower(), item["name"])

    def fields(self, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the members of a record by name, those of anonymous members too."""
        members = {}
        for member in record["members"]:
            if member["name"] == "(anon)":
                members |= self.fields(self.resolve(member["type_id"]))
            else:
                members[member["name"]] = member
        return members


@cache
def read_btf() -> Btf:
    return Btf()


@pytest.fixture
def btf() -> Btf:
    feature = features.btf()
    if feature.verdict is not features.Verdict.SUPPORTED:
        pytest.skip(str(feature))
    return read_btf()


@pytest.mark.parametrize("field", FIELDS)
def test_a_declared_field_is_what_the_kernel_has(field: str, btf: Btf) -> None:
    """A field exists in the kernel's struct with the size and the sign declared."""
    record, name = field.split(".")
    members = btf.fields(btf.by_name["STRUCT", record])
    assert name in members
    member, declared = members[name], FIELDS[field]
    bits = int(declared.bitsize.value) if declared.bitsize else 0
    assert (declared_type(declared.type), bits) == (
        btf.type(member["type_id"]),
        member.get("bitfield_size", 0),
    )


@pytest.mark.parametrize("name", RECORDS)
def test_a_declared_struct_is_one_of_the_kernel(name: str, btf: Btf) -> None:
    """A struct that is declared, in whole or in part, is known to the kernel."""
    assert ("STRUCT", name) in btf.by_name


@pytest.mark.parametrize("name", ENUMERATORS)
def test_a_declared_constant_has_the_kernels_value(name: str, btf: Btf) -> None:
    """An enumerator has the kernel's value, in the enum of that name if it has one."""
    enum, value = ENUMERATORS[name]
    assert btf.enumerators[name] == (enum or "(anon)", value)


@pytest.mark.parametrize("name", TYPEDEFS)
def test_a_declared_typedef_is_the_kernels(name: str, btf: Btf) -> None:
    """A typedef names an integer of the kernel's size and sign."""
    kernel = btf.by_name["TYPEDEF", name]
    assert declared_type(TYPEDEFS[name])[1] == btf.resolve(kernel["id"])["size"]
    assert declared_type(TYPEDEFS[name]) == btf.type(kernel["id"])


# --- the one user


def test_records_are_relocated() -> None:
    """Every struct with fields is declared where accesses to it are relocated (CO-RE)."""
    is_relocated = False
    for node in DECLARATIONS:
        if isinstance(node, c_ast.Pragma):
            is_relocated = "push" in node.string and "preserve_access_index" in node.string
        elif isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Struct):
            assert is_relocated or not node.type.decls, node.type.name


def test_nothing_is_declared_that_the_program_does_not_touch() -> None:
    """A struct, field or constant that sockmap.bpf.c does not name has no place here."""
    source = without_comments(SOURCE.read_text())
    words = set(re.findall(r"\w+", source))
    accessed = set(re.findall(r"(?:->|\.)\s*(\w+)", source))
    assert {name for name in (*RECORDS, *ENUMERATORS) if name not in words} == set()
    assert {field for field in FIELDS if field.split(".")[1] not in accessed} == set()


def test_no_typedef_is_declared_that_nobody_needs() -> None:
    """A typedef serves the program, the header it shares or libbpf's declarations."""
    rest = subprocess.run(
        ["clang", "--target=bpf", "-E", "-P", "-DSOCKGW_VMLINUX_H", SOURCE],  # without the header
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    needed = set(re.findall(r"\w+", rest.stdout))
    used = (*TYPEDEFS.values(), *(field.type for field in FIELDS.values()))
    needed |= {name for node in used for name in identifiers(node)}
    assert set(TYPEDEFS) - needed == set()
