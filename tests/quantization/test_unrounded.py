"""What layers in floating point read where all between INT8 layers is rounded."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from networks import NETWORKS, Builder
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.groups import pieces_of
from ptq3d.quantization.retargeting import retarget
from ptq3d.quantization.targets import TARGETS
from quantizing import graph, observed, planned


def read_by(written: onnx.ModelProto, layer: str) -> set[str]:
    """What makes the input of a layer, through concats and moves."""
    makers = {output: node for node in written.graph.node for output in node.output}

    def origins(name: str) -> set[str]:
        maker = makers.get(name)
        if maker is None or maker.op_type not in ("Concat", "MaxPool"):
            return {name if maker is None else maker.op_type}
        return {one for piece in maker.input for one in origins(piece)}

    return origins(next(node.input[0] for node in written.graph.node if node.name == layer))


def written_with(model: ir.Model, keep: tuple[str, ...], path: Path) -> onnx.ModelProto:
    save_graph(qdq.write(model, planned(model, "triton", keep=keep)), path)
    return onnx.load(path)


KEPT = [("unet", "conv_0"), ("unet", "conv_7"), ("meshnet", "conv_2"), ("resized", "conv_10")]


@pytest.mark.parametrize(("network", "layer"), KEPT)
def test_what_triton_keeps_in_floating_point_reads_what_is_not_rounded(
    network: str, layer: str, tmp_path: Path
) -> None:
    """Also through a concat, whose pieces others read rounded; all else stays as it was, and so do other targets' files."""
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    for name, target in TARGETS.items():
        real, rounded = (planning.place(model, target, keep=(layer,), rounded=late) for late in ((), (layer,)))
        assert (real == rounded) == (name != "triton" or layer == "conv_0")
        gone = set(sum(rounded.tensors, ())) - set(sum(real.tensors, ()))
        assert gone <= {str(value.name) for value in below(model, layer)}
    written = written_with(model, (layer,), tmp_path / "q.onnx")
    assert "DequantizeLinear" not in read_by(written, layer)
    others = {node.name for node in written.graph.node if node.op_type == "Conv"} - {layer}
    assert all("DequantizeLinear" in read_by(written, name) for name in others)


def below(model: ir.Model, layer: str) -> list[ir.Value]:
    """The tensors that a layer reads, straight or through concats and moves."""
    found = [next(node for node in model.graph if node.name == layer).inputs[0]]
    for value in found:
        found.extend(pieces_of(value))
    return found


def shared_concat(path: Path) -> Path:
    b = Builder(23)
    x = b.add("Relu", b.conv("image", 1, 4))
    joined = b.add("Concat", x, b.add("Relu", b.conv(x, 4, 4)), axis=1)
    b.conv(b.add("Concat", b.conv(joined, 8, 4), b.conv(joined, 8, 4), axis=1), 8, 3, kernel=1)
    return b.save(path, "logits", 3)


def test_a_concat_that_integers_are_made_of_is_read_rounded_by_all(tmp_path: Path) -> None:
    """It would have to be stored twice otherwise."""
    path, output = shared_concat(tmp_path / "n.onnx"), tmp_path / "q.onnx"
    one, other = (str(node.name) for node in graph(path).graph if node.inputs[0].name == "concat_4_out")
    assert read_by(written_with(graph(path), (one,), output), one) == {"DequantizeLinear"}
    both = written_with(graph(path), (one, other), output)
    assert read_by(both, one) == read_by(both, other) == {"Relu"}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("network", "layer"), KEPT)
def test_layers_in_floating_point_read_the_same_in_a_file_that_is_retargeted(
    network: str, layer: str, late: bool, tmp_path: Path
) -> None:
    """Rounded where the file has it so, and what is not rounded where it has not."""
    model, target = graph(NETWORKS[network](tmp_path / "n.onnx")), TARGETS["triton"]
    placement = planning.place(model, target, keep=(layer,), rounded=(layer,) if late else ())
    ranges = observed(model, "triton").ranges(placement, method="max", symmetric=False)
    plan = planning.plan(model, placement, ranges, target)
    save_graph(qdq.write(model, plan), tmp_path / "q.onnx")
    again, read = qdq.read(simplify(load_graph(tmp_path / "q.onnx")))
    found = retarget(again, read, target)
    assert found.plan.equals(read)
    assert not found.dropped
