"""Operators and external references of an untrusted ONNX file, read without loading the model.

    found = inspect("model.onnx")        # BundleError: external data, unknown domains, not a model

Only the few fields that can do harm are parsed from the protobuf wire format (onnx.proto), so a
device needs no onnx package; weights are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftkit_export.runtime.errors import BundleError

# Standard operators, and those built into every ONNX Runtime
DOMAINS = (
    "",
    "ai.onnx",
    "com.microsoft",
)
# com.microsoft: an engine compiled for one provider, embedded or at a path
EXTERNAL = ("EPContext",)
MODEL_FIELDS = {"ir": 1, "graph": 7, "opset": 8, "function": 25}
DEEPEST = 32  # levels of nested subgraphs
# Operators that stay shape arithmetic when applied to shapes; Expand, Resize and the like turn a
# shape into data.
ON_SHAPES = (
    "Gather",
    "Concat",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Cast",
    "Identity",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Min",
    "Max",
    "Neg",
    "Abs",
    "Range",
    "Equal",
    "Where",
    "ReduceProd",
)
INTEGERS = (6, 7, 9)  # TensorProto.DataType: int32, int64, bool


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Structure of an ONNX file.

    ir: IR version; opset: of the default domain; nodes: operator type -> count, subgraphs included.
    """

    ir: int
    opset: int
    nodes: dict[str, int]


def inspect(path: str | Path) -> Inspected:
    """Read the file's structure. Raises BundleError naming the file and what is refused in it."""
    where = Path(path)
    try:
        return _inspect(memoryview(where.read_bytes()))
    except _RefusedError as refused:
        raise BundleError(f"{where}: {refused}") from None
    except (ValueError, IndexError, UnicodeDecodeError):
        raise BundleError(
            f"{where}: expected an ONNX model, found other bytes. Export it again"
        ) from None


def shape_nodes(model: str | Path | bytes) -> set[str]:
    """Names of nodes that only compute shapes: from the outputs of Shape and Size, and constants.

    ONNX Runtime keeps them on the CPU whatever the provider (GetCpuPreferredNodes): there is
    nothing to gain elsewhere.
    """
    data = memoryview(model if isinstance(model, bytes) else Path(model).read_bytes())
    names: set[str] = set()
    shapes: set[str] = set()
    constants: set[str] = {""}

    for field, value in fields_of(data):
        if field != MODEL_FIELDS["graph"]:
            continue

        entries = list(fields_of(value))
        for number, entry in entries:
            if number == 5:
                tensor = dict(fields_of(entry))
                if tensor.get(2) in INTEGERS and 8 in tensor:
                    constants.add(text_of(tensor[8]))

        for number, entry in entries:
            if number != 1:
                continue

            parts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
            for inner, item in fields_of(entry):
                if inner in parts:
                    parts[inner].append(text_of(item))

            inputs, outputs, name, (kind, *_) = parts[1], parts[2], parts[3], parts[4]
            if kind in ("Shape", "Size") or (
                kind in ON_SHAPES and shapes & set(inputs) and set(inputs) <= shapes | constants
            ):
                shapes |= set(outputs)
                names |= set(name)

    return names - {""}


class _RefusedError(Exception):
    pass


def _inspect(data: memoryview) -> Inspected:
    ir = 0
    opset = 0
    nodes = dict[str, int]()
    for field, value in fields_of(data):
        if field == MODEL_FIELDS["ir"] and isinstance(value, int):
            ir = value
        elif field == MODEL_FIELDS["opset"] and isinstance(value, memoryview):
            domain = ""
            version = 0
            for inner, item in fields_of(value):
                if inner == 1:
                    domain = text_of(item)
                elif inner == 2 and isinstance(item, int):
                    version = item
            _known(domain)
            if domain in ("", "ai.onnx"):
                opset = version
        elif field == MODEL_FIELDS["graph"]:
            _graph(value, nodes, 0)
        elif field == MODEL_FIELDS["function"]:
            raise _RefusedError(
                "expected plain operators, found functions of the file's own. Do not trust this file"
            )

    if not ir or not nodes:
        raise ValueError

    return Inspected(ir=ir, opset=opset, nodes=nodes)


def _graph(data: memoryview | int, nodes: dict[str, int], depth: int) -> None:
    if depth > DEEPEST:
        raise _RefusedError(
            f"expected graphs nested at most {DEEPEST} deep, found more. Do not trust this file"
        )

    for field, value in fields_of(data):
        if field == 1:
            _node(value, nodes, depth)
        elif field == 5:
            _tensor(value)
        elif field == 15:
            _sparse(value)


def _node(data: memoryview | int, nodes: dict[str, int], depth: int) -> None:
    for field, value in fields_of(data):
        if field == 4:
            name = text_of(value)
            if name in EXTERNAL:
                raise _RefusedError(
                    f"expected operators that compute, found {name}, which opens an engine or a file. "
                    "Do not trust this file"
                )
            nodes[name] = nodes.get(name, 0) + 1
        elif field == 7:
            _known(text_of(value))
        elif field == 5:
            for inner, item in fields_of(value):
                if inner in (5, 10):
                    _tensor(item)
                elif inner in (22, 23):
                    _sparse(item)
                elif inner in (6, 11):
                    _graph(item, nodes, depth + 1)


def _sparse(data: memoryview | int) -> None:
    """A sparse tensor: values and indices."""
    for inner, item in fields_of(data):
        if inner in (1, 2):
            _tensor(item)


def _tensor(data: memoryview | int) -> None:
    for field, value in fields_of(data):
        if field == 13 or (field == 14 and value != 0):
            named = ""
            if field == 13:
                pair = {inner: text_of(item) for inner, item in fields_of(value)}
                named = f" at {pair.get(2, '')!r}" if pair.get(1) == "location" else ""
            raise _RefusedError(
                f"expected its weights inside the file, found them outside{named}. Do not trust it"
            )


def _known(domain: str) -> None:
    if domain not in DOMAINS:
        raise _RefusedError(
            f"expected standard operators, found the domain {domain!r}. Do not trust this file"
        )


def text_of(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise ValueError
    return bytes(value).decode()


def fields_of(data: memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
    """Parse the protobuf wire format into (field number, bytes or integer).

    Raises ValueError for anything else.
    """
    if isinstance(data, int):
        raise ValueError

    at = 0
    end = len(data)
    while at < end:
        key, at = _varint(data, at)
        if key >= 1 << 32:  # other parsers would truncate it, and see another field
            raise ValueError

        kind = key & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue

        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError

        if at + size > end:
            raise ValueError

        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at = at + 1
        shift = shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError
