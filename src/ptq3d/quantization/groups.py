"""Tensors that share a scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from ptq3d.int8 import Scale
from ptq3d.quantization.targets import MOVES, Target


class Groups:
    """Disjoint sets of tensor names, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._of: dict[str, list[str]] = {}

    def join(self, names: Sequence[str]) -> None:
        """Put these, and all that are together with one of them, into one set."""
        merged: list[str] = []
        for name in names:
            for member in self._of.get(name, [name]):
                if member not in merged:
                    merged.append(member)
        for member in merged:
            self._of[member] = merged

    def tuples(self) -> tuple[tuple[str, ...], ...]:
        """Every set once."""
        seen: dict[int, tuple[str, ...]] = {}
        for members in self._of.values():
            seen.setdefault(id(members), tuple(members))
        return tuple(seen.values())


def pieces_of(value: ir.Value | None) -> Sequence[ir.Value | None]:
    """The tensors that a concat or a mere move makes `value` of; none where anything else makes it."""
    producer = None if value is None else value.producer()
    if producer is None or (producer.op_type != "Concat" and producer.op_type not in MOVES):
        return ()
    return producer.inputs if producer.op_type == "Concat" else producer.inputs[:1]


def quantized_below(value: ir.Value | None, scales: Mapping[str, Scale]) -> Iterable[str]:
    """The quantized tensors that a layer's input is made of through concats and moves.

    Args:
        value: that input.
        scales: of the quantized tensors, by name.
    """
    if value is not None and value.name in scales:
        yield str(value.name)
        return
    for piece in pieces_of(value):
        yield from quantized_below(piece, scales)


def share_steps(model: ir.Model, shared: Groups, target: Target) -> None:
    """Let the tensors around operators of `target.selects` have one scale, so that these move integers.

    Args:
        model: the graph that is placed.
        shared: the tensors to quantize, changed in place.
        target: the one to place for.
    """
    planned = {name for group in shared.tuples() for name in group} if target.selects else set()
    origins: dict[str, list[str]] = {}
    for node in model.graph:
        value = node.outputs[0]
        pieces = node.inputs[:1] if node.op_type in target.selects else pieces_of(value)
        names = [str(piece.name) for piece in pieces if piece is not None]
        found = [one for name in names for one in ([name] if name in planned else origins.get(name, []))]
        origins[str(value.name)] = found
        if found and value.name in planned:
            shared.join([str(value.name), *found])
