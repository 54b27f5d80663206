"""The graphs that benchmarks/gpu.py runs, small enough to be carried to a machine with a GPU and nothing but PyTorch on it.

    python benchmarks/gpu_graphs.py OUT [NAME ...]

Writes OUT/NAME.fp32.onnx and OUT/NAME.int8.onnx (target triton, no rescaled channels): the same network, since the weights of both are
the integers that a seed gives, times their steps. Sizes are those of benchmarks/sizes.py for windows of 96^3; `mlperf` is the
3D U-Net of MLPerf Inference on KiTS19 and `meshnet` one of Brainchop's MeshNets, for windows of 128^3. A head that widens is left
out of both, as engines run it. The number of windows is free where the network allows it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
import onnx_ir as ir
import torch
from gpu_networks import filled, stripped, volume
from onnx import numpy_helper
from sizes import WINDOW, build
from torch import Tensor, nn

from ptq3d.errors import GraphError
from ptq3d.graphs.batching import free_batch
from ptq3d.graphs.export import export_network
from ptq3d.graphs.layers import layers, weight_axis, weight_value
from ptq3d.graphs.split_head import split_head
from ptq3d.quantization import calibration, planning
from ptq3d.quantization.quantizer import Quantized, Recipe, quantize_graph
from ptq3d.quantization.targets import get_target

NAMES = ("unet", "nnunet", "segresnet", "transunet", "swinunetr", "mlperf", "meshnet")
LARGE_WINDOW = (128, 128, 128)
FILTERS = (32, 64, 128, 256, 320)
SHARES = np.array([1.0, 0.75, 1.25, 0.9], np.float32)  # of the spread of weights, channel after channel


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, InstanceNorm, ReLU."""
    conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.InstanceNorm3d(outputs, affine=True), nn.ReLU())


class KitsUNet(nn.Module):
    """The 3D U-Net of MLPerf, as its training and inference benchmarks have it.

    Source: MLCommons, training/image_segmentation (filters 32 to 320, five strided levels, transposed convolutions with bias).
    """

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        pairs = list(zip((*FILTERS, FILTERS[-1]), (*FILTERS[1:], FILTERS[-1]), strict=False))[: len(FILTERS)]
        self.first = nn.Sequential(block(1, FILTERS[0]), block(FILTERS[0], FILTERS[0]))
        self.down = nn.ModuleList(nn.Sequential(block(i, o, 2), block(o, o)) for i, o in pairs)
        turned = list(reversed(pairs))
        self.up = nn.ModuleList(nn.ConvTranspose3d(o, i, 2, 2) for i, o in turned)
        self.joined = nn.ModuleList(nn.Sequential(block(2 * i, i), block(i, i)) for i, _ in turned)
        self.head = nn.Conv3d(FILTERS[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([up(x), levels.pop()], 1))
        return self.head(x)


def mesh_net(channels: int = 30, classes: int = 18) -> nn.Sequential:
    """Dilated convolutions of few channels, whose number no power of two divides.

    Source: Fedorov et al. 2017, "End-to-end learning of brain tissue segmentation from imperfect labeling", in the sizes of
    Brainchop's subcortical model.
    """
    made: list[nn.Module] = []
    for dilation in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        made += [nn.Conv3d(channels if made else 1, channels, 3, 1, dilation, dilation), nn.ELU()]
    return nn.Sequential(*made, nn.Conv3d(channels, classes, 1))


def axes_of(model: ir.Model) -> dict[str, int]:
    """Weight -> axis of its output channels, for every layer with constant weights."""
    found = {}
    for node in model.graph:
        weight = weight_value(node) if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") else None
        if weight is not None:
            found[str(weight.name)] = weight_axis(node)
    return found


def with_steps(model: onnx.ModelProto, axes: dict[str, int], given: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """The graph with NAME/step for each weight that has none: those of another graph, or of the weights' own spread."""
    known = {one.name: one for one in (given.graph.initializer if given is not None else ())}
    present = {one.name for one in model.graph.initializer}
    for tensor in list(model.graph.initializer):
        name = tensor.name.removesuffix("/q")
        if name not in axes or f"{name}/step" in present:
            continue
        if f"{name}/step" in known:
            model.graph.initializer.append(known[f"{name}/step"])
            continue
        values = numpy_helper.to_array(tensor)
        channels = values.shape[axes[name]]
        steps = np.float32(values.std() / 32) * np.resize(SHARES, channels)
        model.graph.initializer.append(numpy_helper.from_array(steps, f"{name}/step"))
    return model


def quantized(model: ir.Model, window: tuple[int, ...]) -> Quantized:
    """For the target triton, calibrated on one image; no weight is changed, so that all are what a seed gives, no layer leaves INT8."""
    placement = planning.place(model, get_target("triton"))
    seen = calibration.observe(model, placement, iter([volume(window).numpy()]), 1)
    return quantize_graph(model, seen, Recipe("triton", equalize=False, rounding="nearest", second_terms=0.0))


def require_same(model: onnx.ModelProto, again: onnx.ModelProto) -> None:
    """The INT8 weights of a graph are those that its seed gives."""
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for tensor in again.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and not np.array_equal(
            numpy_helper.to_array(tensor), stored[tensor.name]
        ):
            raise GraphError(f"the INT8 weight '{tensor.name}' is not what its seed gives.")


def free(model: ir.Model) -> str:
    """A free number of windows where it can be, "" or why not."""
    try:
        free_batch(model)
    except GraphError as error:
        return str(error)
    return ""


def pair(network: nn.Module, window: tuple[int, int, int]) -> tuple[dict[str, onnx.ModelProto], str]:
    """Both graphs of a network, without their large weights, and what is to be said of them."""
    model = export_network(network.eval(), channels=1, window=window).model
    axes = axes_of(model)
    random = with_steps(ir.to_proto(model), axes)
    model = ir.from_proto(filled(stripped(random, axes)))
    macs = sum(layer.macs for layer in layers(model))
    made = quantized(model, window)
    integers, floats = split_head(made.model), split_head(model)
    classes = integers.head.classes if integers.head is not None else 0
    why = [free(one.body) for one in (integers, floats)]
    bodies = [ir.to_proto(one.body) for one in (integers, floats)]
    for body in bodies:
        for node in body.graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    small = with_steps(bodies[0], axes, random), with_steps(bodies[1], axes, bodies[0])
    found = {kind: stripped(one, axes, classes=classes) for kind, one in zip(("int8", "fp32"), small, strict=True)}
    require_same(bodies[0], filled(found["int8"]))
    said = f"{macs / 1e9:.1f} GMAC, {100 * made.int8_mac_share:.1f} % of it INT8, {integers.reason}"
    return found, f"{said}; {why[0]}" if why[0] else said


LARGE = {"mlperf": KitsUNet, "meshnet": mesh_net}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        began = perf_counter()
        torch.manual_seed(0)
        network, window = (LARGE[name](), LARGE_WINDOW) if name in LARGE else (build(name), WINDOW)
        found, said = pair(network, window)
        for kind, model in found.items():
            onnx.save(model, options.out / f"{name}.{kind}.onnx")
        size = sum((options.out / f"{name}.{kind}.onnx").stat().st_size for kind in found)
        print(f"{name:10} {size / 1e3:7.0f} kB  {perf_counter() - began:4.0f} s  {said}", flush=True)


if __name__ == "__main__":
    main()
