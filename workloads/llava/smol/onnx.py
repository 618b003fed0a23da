"""Weights and wiring of an ONNX file: as much of its protocol-buffer format as that takes, and no more.

Source:  onnx.proto of ONNX, field numbers of ModelProto, GraphProto, NodeProto and TensorProto.
Differs: only fp32 weights that are stored in the file itself (raw_data) are read; all else is passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workloads.errors import UserError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_TYPE = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation with the names of what it takes and gives."""

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Weights by name, and operations in order."""

    weights: dict[str, np.ndarray]
    nodes: tuple[Node, ...]


def read(path: Path) -> Graph:
    """The graph in a file; raises `UserError` when it is no whole ONNX file."""
    try:
        return _graph(memoryview(path.read_bytes()))
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: not a whole ONNX file: {error}") from None


def _graph(data: memoryview) -> Graph:
    weights: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    for part in (value for field, value in _fields(data) if field == _MODEL_GRAPH):
        for field, value in _fields(_as_bytes(part)):
            if field == _GRAPH_NODE:
                nodes.append(_node(_as_bytes(value)))
            elif field == _GRAPH_INITIALIZER:
                weights |= _weight(_as_bytes(value))
    if not nodes:
        raise ValueError("it holds no operations")
    return Graph(weights=weights, nodes=tuple(nodes))


def _node(data: memoryview) -> Node:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_TYPE: []}
    for field, value in _fields(data):
        if field in texts:
            texts[field].append(_text(value))
    name = "".join(texts[_NODE_TYPE])
    return Node(type=name, inputs=tuple(texts[_NODE_INPUT]), outputs=tuple(texts[_NODE_OUTPUT]))


def _weight(data: memoryview) -> dict[str, np.ndarray]:
    """Name and values of one weight; nothing when it is not stored here in fp32."""
    shape: list[int] = []
    name, kind, raw = "", 0, None
    for field, value in _fields(data):
        if field == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif field == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif field == _TENSOR_NAME:
            name = _text(value)
        elif field == _TENSOR_RAW:
            raw = _as_bytes(value)
    if kind != _FLOAT or raw is None:
        return {}
    return {name: np.frombuffer(raw, dtype="<f4").reshape(shape)}


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; numbers are ints, all else is bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {field} is of unknown kind {kind}")
        if at + size > len(data):
            raise ValueError(f"field {field} is cut off")
        yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _as_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_as_bytes(value)).decode("utf-8")
