# SPDX-License-Identifier: Apache-2.0
"""bpf/vmlinux.h against the kernel that runs these tests, and against its users.

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
SOURCES = (BPF / "sockmap.bpf.c", BPF / "wire.bpf.c", BPF / "direct.bpf.c")

# Constants that are no enumerators, and so not in BTF, are here.
MACRO_HEADERS = ("linux/pkt_cls.h",)

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


def declared_value(node: c_ast.Node) -> int:
    match node:
        case c_ast.UnaryOp(op="-", expr=expression):
            return -declared_value(expression)
        case c_ast.Constant(value=value):
            return int(value, 0)
    raise NotImplementedError(node)


DECLARATIONS = declarations()
TYPEDEFS = {node.name: node.type for node in DECLARATIONS if isinstance(node, c_ast.Typedef)}
RECORDS = {
    node.type.name: node.type
    for node in DECLARATIONS
    if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Struct)
}
ENUMERATORS = {
    item.name: (node.type.name, declared_value(item.value))
    for node in DECLARATIONS
    if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Enum)
    for item in node.type.values.enumerators
}


def is_nameless(node: c_ast.Node) -> bool:
    """Tell whether a field is a record that has no name but the field's."""
    return (
        isinstance(node, c_ast.TypeDecl)
        and isinstance(node.type, c_ast.Struct | c_ast.Union)
        and node.type.name is None
    )


def declared_fields(record: c_ast.Node) -> dict[str, c_ast.Decl]:
    """Return the fields of a record by path, those of records without a name too."""
    fields = {}
    for field in record.decls or ():
        if field.name is None:
            fields |= declared_fields(field.type)
        elif is_nameless(field.type):
            inner = declared_fields(field.type.type)
            fields |= {f"{field.name}.{path}": declared for path, declared in inner.items()}
        else:
            fields[field.name] = field
    return fields


FIELDS = {
    f"{name}.{path}": declaration
    for name, record in RECORDS.items()
    for path, declaration in declared_fields(record).items()
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


def declared_shape(field: c_ast.Decl) -> tuple[Type, int]:
    """Return a field's type, and its size in bits if it is a bit field."""
    return declared_type(field.type), int(field.bitsize.value) if field.bitsize else 0


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
            value["name"]: (item["name"], signed(value["val"]))
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
        """Return the members of a record by path, those of records without a name too."""
        members = {}
        for member in record["members"]:
            item = self.resolve(member["type_id"])
            is_record = item["kind"] in {"STRUCT", "UNION"} and item["name"] == "(anon)"
            if is_record and member["name"] == "(anon)":
                members |= self.fields(item)
            elif is_record:
                inner = self.fields(item)
                members |= {f"{member['name']}.{path}": one for path, one in inner.items()}
            else:
                members[member["name"]] = member
        return members

    def shape(self, member: dict[str, Any]) -> tuple[Type, int]:
        """Return a member's type, and its size in bits if it is a bit field."""
        return self.type(member["type_id"]), member.get("bitfield_size", 0)


def signed(value: int) -> int:
    """Undo what bpftool does to a negative value: it writes 32 bits without a sign."""
    return value - (1 << 32) if value >> 31 == 1 else value


@cache
def macros() -> dict[str, int]:
    """Return the macros of the kernel's headers that are a number."""
    includes = [word for header in MACRO_HEADERS for word in ("-include", header)]
    done = subprocess.run(
        ["cc", "-dM", "-E", *includes, "-xc", "/dev/null"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.findall(r"^#define (\w+) \(?(-?\d+)\)?$", done.stdout, re.MULTILINE)
    return {name: int(value) for name, value in found}


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
    record, _, path = field.partition(".")
    members = btf.fields(btf.by_name["STRUCT", record])
    assert path in members
    assert declared_shape(FIELDS[field]) == btf.shape(members[path])


@pytest.mark.parametrize("name", RECORDS)
def test_a_declared_struct_is_one_of_the_kernel(name: str, btf: Btf) -> None:
    """A struct that is declared, in whole or in part, is known to the kernel."""
    assert ("STRUCT", name) in btf.by_name


@pytest.mark.parametrize("name", ENUMERATORS)
def test_a_declared_constant_has_the_kernels_value(name: str, btf: Btf) -> None:
    """An enumerator has the kernel's value, in the enum of that name if it has one."""
    enum, value = ENUMERATORS[name]
    if name in btf.enumerators:
        assert btf.enumerators[name] == (enum or "(anon)", value)
    else:
        assert enum is None
        assert macros()[name] == value


@pytest.mark.parametrize("name", TYPEDEFS)
def test_a_declared_typedef_is_the_kernels(name: str, btf: Btf) -> None:
    """A typedef names an integer of the kernel's size and sign."""
    kernel = btf.by_name["TYPEDEF", name]
    assert declared_type(TYPEDEFS[name])[1] == btf.resolve(kernel["id"])["size"]
    assert declared_type(TYPEDEFS[name]) == btf.type(kernel["id"])


# --- the users


def relocated_records() -> set[str]:
    """Return the structs that are declared where accesses to them are relocated (CO-RE)."""
    names, is_relocated = set(), False
    for node in DECLARATIONS:
        if isinstance(node, c_ast.Pragma):
            is_relocated = "push" in node.string and "preserve_access_index" in node.string
        elif isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Struct) and is_relocated:
            names.add(node.type.name)
    return names


@pytest.mark.parametrize("name", [name for name, record in RECORDS.items() if record.decls])
def test_a_record_is_relocated_or_whole(name: str, btf: Btf) -> None:
    """A struct is relocated; or has every field of the kernel's, which must then be its ABI."""
    if name in relocated_records():
        return
    declared = [
        (path, declared_shape(field)) for path, field in declared_fields(RECORDS[name]).items()
    ]
    members = btf.fields(btf.by_name["STRUCT", name])
    assert declared == [(path, btf.shape(member)) for path, member in members.items()]


def test_nothing_is_declared_that_no_program_touches() -> None:
    """A struct, field or constant that no program names has no place here."""
    source = "".join(without_comments(path.read_text()) for path in SOURCES)
    words = set(re.findall(r"\w+", source))
    accessed = set(re.findall(r"(?:->|\.)\s*(\w+)", source))
    # BPF_CORE_READ(pointer, field, field.of_that), bpf_core_field_offset(struct, field).
    for named in re.findall(r"(?:BPF_CORE_READ|bpf_core_field_offset)\(([^;]*)\)", source):
        accessed |= set(re.findall(r"\w+", named.partition(",")[2]))
    words |= {name for field in FIELDS.values() for name in records_in(field.type)}
    assert {name for name in (*RECORDS, *ENUMERATORS) if name not in words} == set()
    relocated = relocated_records()
    fields = {field for field in FIELDS if field.partition(".")[0] in relocated}
    assert {field for field in fields if field.rpartition(".")[2] not in accessed} == set()


def records_in(node: c_ast.Node) -> set[str]:
    """Return the structs that a declaration is made of."""
    names = {node.name} if isinstance(node, c_ast.Struct) and node.name else set()
    return names.union(*(records_in(child) for child in node))


def test_no_typedef_is_declared_that_nobody_needs() -> None:
    """A typedef serves a program, the headers it shares or libbpf's declarations."""
    needed: set[str] = set()
    for source in SOURCES:
        rest = subprocess.run(
            ["clang", "--target=bpf", "-E", "-P", "-DSOCKGW_VMLINUX_H", source],  # not the header
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        needed |= set(re.findall(r"\w+", rest.stdout))
    used = (*TYPEDEFS.values(), *(field.type for field in FIELDS.values()))
    needed |= {name for node in used for name in identifiers(node)}
    assert set(TYPEDEFS) - needed == set()
