"""What a runtime's rule about graphs is, and how rules read nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps

import onnx_ir as ir

Version = tuple[int, int]  # (major, minor) of a runtime
Found = tuple[str, str]  # (name of a node or tensor, what is wrong with it and how to mend it)
Rule = Callable[[ir.Model, Version], Iterable[Found]]


@dataclass(frozen=True)
class Setting:
    """What a rule about one node may depend on besides the node.

    Args:
        version: of the runtime.
        opset: of the graph.
    """

    version: Version
    opset: int


NodeRule = Callable[[ir.Node, Setting], str | None]


def on(*operators: str) -> Callable[[NodeRule], Rule]:
    """Make a rule about graphs out of one about nodes.

    Args:
        operators: the ones that it looks at; all where none is named.
    """

    def made(judge: NodeRule) -> Rule:
        @wraps(judge)
        def rule(model: ir.Model, version: Version) -> Iterator[Found]:
            setting = Setting(version, model.opset_imports.get("", 0))
            for node in model.graph:
                said = judge(node, setting) if not operators or node.op_type in operators else None
                if said is not None:
                    yield str(node.name), said

        return rule

    return made


def number(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute of one integer."""
    return node.attributes[name].as_int() if name in node.attributes else default


def numbers(node: ir.Node, name: str) -> tuple[int, ...]:
    """An attribute of many integers; none where the node does not have it."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else ()


def text(node: ir.Node, name: str, default: str) -> str:
    """An attribute of letters."""
    return node.attributes[name].as_string() if name in node.attributes else default


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input; None where the node leaves it out."""
    return node.inputs[index] if index < len(node.inputs) else None


def maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a tensor; None for inputs and constants."""
    return None if value is None else value.producer()


def is_stored(value: ir.Value | None) -> bool:
    """Whether a tensor is a constant of the file."""
    return value is not None and value.const_value is not None


def type_of(value: ir.Value | None) -> ir.DataType | None:
    """The type of a tensor's elements, None where the graph does not say."""
    if value is None:
        return None
    return value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype


def rank_of(value: ir.Value | None) -> int | None:
    """The number of a tensor's axes, None where the graph does not say."""
    return None if value is None or value.shape is None else len(value.shape)


def tensors(model: ir.Model) -> Iterator[ir.Value]:
    """Every tensor of a graph: inputs, constants, and what nodes make."""
    yield from dict.fromkeys((*model.graph.inputs, *model.graph.initializers.values()))
    for node in model.graph:
        yield from node.outputs
