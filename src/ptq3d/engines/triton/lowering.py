"""From a Q/DQ graph of the target `triton` to the steps that run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from ptq3d.engines.operators import OPERATORS
from ptq3d.engines.triton import elementwise, images, layers, moves, tails
from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.attention import attend, attentions
from ptq3d.engines.triton.folding import fold, restore_groups, without_casts
from ptq3d.engines.triton.joining import join
from ptq3d.engines.triton.memory import planned
from ptq3d.engines.triton.network import Network, Node, read_network
from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.steps import UNIT, Enter, Float, View
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import canonical_order, row_of, row_strides
from ptq3d.errors import EngineError, few

Rule = Callable[[Assembly, Node], None]
RULES: Mapping[str, Rule] = {
    "Add": elementwise.add,
    "AveragePool": images.pool,
    "Cast": moves.alias,
    "Concat": moves.concat,
    "Conv": layers.convolve,
    "ConvTranspose": layers.upsample,
    "DequantizeLinear": moves.dequantize,
    "Flatten": moves.reshape,
    "Gather": moves.gather,
    "Gemm": layers.linear,
    "GroupNormalization": images.normalize,
    "Identity": moves.alias,
    "InstanceNormalization": images.normalize,
    "LayerNormalization": images.normalize_rows,
    "MatMul": layers.linear,
    "MaxPool": images.pool,
    "Mul": elementwise.multiply,
    "Pad": moves.pad,
    "QuantizeLinear": elementwise.quantize,
    "Reshape": moves.reshape,
    "Resize": images.resize,
    "Slice": moves.cut,
    "Split": moves.split,
    "Squeeze": moves.reshape,
    "Transpose": moves.transpose,
    "Unsqueeze": moves.reshape,
    **dict.fromkeys(tails.ACTIVATIONS, elementwise.activate),
}


def lower(source: Path | onnx.ModelProto, batch: int) -> Program:
    """The steps of a network, and where its buffers lie in one arena.

    Args:
        source: a Q/DQ graph of one input (N, C, X, Y, Z) and one output, simplified; each activation is int8 or uint8 with one step and
            zero-point.
        batch: N; any number where the graph's first axis is free, else the one that is fixed there.

    Raises:
        EngineError: an operator that the engine does not know, or activations of another type, or with several steps.
        GraphError: the graph cannot be read.
    """
    network = restore_groups(without_casts(fold(read_network(source, batch))))
    _require_known(network)
    assembly = Assembly(network, join(network))
    found = attentions(network)
    assembly.done.update(node for one in found.values() for node in one.nodes)
    entry = assembly.fresh(network.shapes[network.input], "fp32", order=range(len(network.shapes[network.input])))
    _enter(assembly, entry)
    for node in network.nodes:
        if node in assembly.done:
            continue
        if node in found:
            attend(assembly, node, found[node])
        else:
            RULES.get(node.op, Assembly.in_float)(assembly, node)
    output = _answer(assembly)
    reports = tuple(assembly.layers[node] for node in network.nodes if node in assembly.layers)
    steps = tuple(assembly.steps)
    notes = tuple(f"{step.op} '{step.name}' runs in FP16 by PyTorch." for step in steps if isinstance(step, Float))
    buffers, unsigned = tuple(assembly.buffers), output.dtype == "int8" and network.unsigned(network.output)
    return planned(Program(steps, buffers, entry, output, reports, notes=notes, unsigned=unsigned))


def _require_known(network: Network) -> None:
    unknown = [node for node in network.nodes if node.op not in OPERATORS and node.op not in RULES]
    if unknown:
        named = few(f"{node.op} '{node.name}'" for node in unknown)
        raise EngineError(f"the triton engine does not know {named}. Use --engine onnxruntime, openvino or tensorrt.")


def _enter(assembly: Assembly, entry: View) -> None:
    """The windows in the types that the graph reads: INT8 for every step it rounds them with, FP16 where it does not."""
    network = assembly.network
    tail = tails.settle(network, network.input, Tail(()))
    if tail.dtype == "int8":
        assembly.emit(Enter(network.input, assembly.store(tail), entry))
        return
    roundings = [node for node in network.readers(network.input) if node.op == "QuantizeLinear"]
    if len(roundings) < len(network.readers(network.input)) or network.input == network.output:
        out = assembly.fresh(entry.shape, "fp16")
        assembly.name([network.input], out)
        assembly.emit(Enter(network.input, out, entry))
    for node in roundings:
        tail = tails.settle_rounding(network, node)
        assembly.emit(Enter(node.name, assembly.store(tail), entry))


def _answer(assembly: Assembly) -> View:
    """The output in a buffer of its own, channels last: as integers where the graph ends with them, else in FP32."""
    network = assembly.network
    view = assembly.view(network.output)
    producer = network.producer(network.output)
    integers = producer is not None and producer.op == "QuantizeLinear"
    wanted, order = "int8" if integers else "fp32", canonical_order(len(view.shape))
    strides = row_strides(view.shape, order, row_of(view.shape, wanted, order))
    buffer = assembly.buffers[view.buffer]
    whole = (view.offset, view.strides, buffer.dtype) == (0, strides, wanted) and view.dtype == wanted
    if whole:
        return view
    out = assembly.fresh(view.shape, "int8" if integers else "fp32", view.scale if integers else UNIT)
    return assembly.converted(view, out, f"{network.output}/answer")
