"""Add a class to an exported ONNX file, without the onnx package: a device has only numpy.

    data = with_class(path.read_bytes(), weights, bias, temperature=1.3, metadata={"labels": ...})

The operators after the network are appended to the graph, by the protobuf wire format (onnx.proto);
everything before them stays as it is, byte for byte. enroll.py says what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import BundleError
from ftkit_export.runtime.onnxfile import MODEL_FIELDS, fields_of, text_of

# Field numbers of onnx.proto
NODE, INITIALIZER, OUTPUT = 1, 5, 12  # GraphProto
NODE_INPUT, NODE_OUTPUT = 1, 2
METADATA = 14  # ModelProto
FLOAT, INT64 = 1, 7  # TensorProto.DataType
FIRST_OUTPUTS = ("probabilities", "logits")
OLDEST_OPSET = 18  # Reduce operators take their axes as an input since

Field = tuple[int, int | bytes]


def with_class(
    model: bytes, weights: Array, bias: Array, temperature: float, metadata: Mapping[str, str]
) -> bytes:
    """The file with one more class, the last, in its first output.

    weights (old classes, D), bias (old classes,): float32, see enroll.py. temperature: of the
    probabilities; only a core form, whose first output are logits, needs it. metadata: entries to
    replace. Raises BundleError for a file that ftkit has not exported.
    """
    try:
        return _with_class(memoryview(model), weights, bias, temperature, metadata)
    except (ValueError, IndexError, KeyError, StopIteration):
        raise BundleError(
            "model: expected a file exported by ftkit, with probabilities or logits, and an embedding, found another. "
            "Export the run again"
        ) from None


def _with_class(
    model: memoryview,
    weights: Array,
    bias: Array,
    temperature: float,
    metadata: Mapping[str, str],
) -> bytes:
    fields = list(fields_of(model))
    for number, value in fields:
        if number == MODEL_FIELDS["opset"]:
            opset = dict(fields_of(value))
            if not bytes(opset.get(1, b"")) and opset[2] < OLDEST_OPSET:  # type: ignore[operator]  # an integer
                raise ValueError

    written: list[Field] = []
    for number, value in fields:
        if number == MODEL_FIELDS["graph"]:
            written.append((number, _with_operators(value, weights, bias, temperature)))
        elif number != METADATA or text_of(dict(fields_of(value))[1]) not in metadata:
            written.append((number, value if isinstance(value, int) else bytes(value)))

    entries = [_message([(1, key.encode()), (2, text.encode())]) for key, text in metadata.items()]
    return _message([*written, *((METADATA, entry) for entry in entries)])


def _with_operators(
    graph: memoryview | int, weights: Array, bias: Array, temperature: float
) -> bytes:
    fields = list(fields_of(graph))
    outputs = [value for number, value in fields if number == OUTPUT]
    named = [text_of(dict(fields_of(value))[1]) for value in outputs]
    first = next(name for name in named if name in FIRST_OUTPUTS)
    if "embedding" not in named:
        raise ValueError

    classes = len(weights)
    prefix = f"class{classes}/"  # another enrolment has another number of classes
    before = f"{prefix}{first}"
    written: list[Field] = []
    for number, value in fields:
        if number == NODE:
            written.append((number, _renamed(value, first, before)))
        elif number == OUTPUT and text_of(dict(fields_of(value))[1]) == first:
            written.append((number, _output(first, classes + 1)))
        else:
            written.append((number, value if isinstance(value, int) else bytes(value)))

    def name(of: str) -> str:
        return prefix + of

    nodes = [
        _node(prefix, "ReduceL2", ["embedding", name("axes")], name("length")),
        _node(prefix, "Max", [name("length"), name("tiny")], name("divisor")),
        _node(prefix, "Div", ["embedding", name("divisor")], name("unit")),
        _node(prefix, "Gemm", [name("unit"), name("weights"), name("bias")], name("each")),
        _node(prefix, "ReduceMin", [name("each"), name("axes")], name("new")),
    ]
    constants: dict[str, Array] = {
        "axes": np.array([1], np.int64),
        "tiny": np.array([1e-12], np.float32),
        "weights": np.ascontiguousarray(weights.T.astype(np.float32)),  # (D, classes)
        "bias": bias.astype(np.float32),
    }
    if bias.shape != (classes,):
        raise ValueError

    if first == "probabilities":
        constants["one"] = np.array([1], np.float32)
        nodes += [
            _node(prefix, "Sigmoid", [name("new")], name("share")),
            _node(prefix, "Sub", [name("one"), name("share")], name("rest")),
            _node(prefix, "Mul", [before, name("rest")], name("old")),
            _node(prefix, "Concat", [name("old"), name("share")], first, axis=1),
        ]
    else:
        constants["divide"] = np.array([1 / temperature], np.float32)
        constants["multiply"] = np.array([temperature], np.float32)
        nodes += [
            _node(prefix, "Mul", [before, name("divide")], name("scaled")),
            _node(prefix, "ReduceLogSumExp", [name("scaled"), name("axes")], name("all")),
            _node(prefix, "Add", [name("all"), name("new")], name("sum")),
            _node(prefix, "Mul", [name("sum"), name("multiply")], name("logit")),
            _node(prefix, "Concat", [before, name("logit")], first, axis=1),
        ]
    tensors = [tensor(prefix + key, value) for key, value in constants.items()]
    return _message(
        [
            *written,
            *((NODE, node) for node in nodes),
            *((INITIALIZER, constant) for constant in tensors),
        ]
    )


def tensor(name: str, value: Array) -> bytes:
    """A TensorProto of float32 or int64."""
    types = {np.dtype(np.float32): FLOAT, np.dtype(np.int64): INT64}
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    dimensions: list[Field] = [(1, size) for size in value.shape]
    return _message(
        [*dimensions, (2, types[value.dtype]), (8, name.encode()), (9, little.tobytes())]
    )


def _node(prefix: str, kind: str, inputs: Sequence[str], output: str, axis: int = -1) -> bytes:
    fields: list[Field] = [(1, each.encode()) for each in inputs]
    fields += [(2, output.encode()), (3, f"{prefix}{kind}/{output}".encode()), (4, kind.encode())]
    if axis >= 0:  # AttributeProto: name, i, type INT
        fields.append((5, _message([(1, b"axis"), (3, axis), (20, 2)])))
    return _message(fields)


def _renamed(node: memoryview | int, old: str, new: str) -> bytes:
    """The node with one of its inputs or outputs under another name."""
    fields: list[Field] = []
    for number, value in fields_of(node):
        if number in (NODE_INPUT, NODE_OUTPUT) and text_of(value) == old:
            fields.append((number, new.encode()))
        else:
            fields.append((number, value if isinstance(value, int) else bytes(value)))
    return _message(fields)


def _output(name: str, classes: int) -> bytes:
    """A ValueInfoProto: float32 [batch, classes]."""
    dimensions = [_message([(2, b"batch")]), _message([(1, classes)])]
    shape = _message([(1, dimension) for dimension in dimensions])
    kind = _message([(1, _message([(1, FLOAT), (2, shape)]))])
    return _message([(1, name.encode()), (2, kind)])


def _message(fields: Sequence[Field]) -> bytes:
    """The wire format of fields: integers as varints, everything else with its length."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(_varint(number << 3) + _varint(value))
        else:
            parts.append(_varint(number << 3 | 2) + _varint(len(value)) + value)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    if value < 0:  # ten bytes, as a 64-bit two's complement
        value += 1 << 64
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
