"""Small ONNX networks that the tests quantize and run: every operator of the zoo in a few thousand multiply-accumulates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WINDOW = (8, 12, 10)


class Builder:
    """Adds nodes one after the other and keeps their weights."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def weight(self, *shape: int, spread: float = 1.0) -> str:
        name = f"w{len(self.weights)}"
        fan = max(int(np.prod(shape[1:])), 1)
        values = self.random.normal(0, spread / np.sqrt(fan), shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(self, x: str, source: int, channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> str:
        weight = self.weight(channels, source, kernel, kernel, kernel)
        pads = [dilation * (kernel // 2)] * 6
        return self.add(
            "Conv", x, weight, self.weight(channels), pads=pads, strides=[stride] * 3, dilations=[dilation] * 3
        )

    def save(
        self, path: Path, output: str, classes: int, window: tuple[int, int, int] = WINDOW, opset: int = 20
    ) -> Path:
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *window])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes, *window])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def unet(path: Path) -> Path:
    """Two levels: strided convolution down, ConvTranspose up, concat, BatchNormalization, odd channel counts."""
    b = Builder(1)
    first = b.add("Relu", b.conv("image", 1, 7))
    down = b.conv(first, 7, 12, stride=2)
    b.weights += [
        numpy_helper.from_array(b.random.uniform(0.5, 1.5, 12).astype(np.float32), name)
        for name in ("scale", "shift", "mean", "variance")
    ]
    deep = b.add("Relu", b.add("BatchNormalization", down, "scale", "shift", "mean", "variance"))
    up = b.add("ConvTranspose", deep, b.weight(12, 7, 2, 2, 2), b.weight(7), strides=[2, 2, 2])
    joined = b.add("Concat", first, up, axis=1)
    last = b.add("LeakyRelu", b.conv(joined, 14, 8), alpha=0.1)
    b.conv(last, 8, 5, kernel=1)
    return b.save(path, "logits", 5)


def meshnet(path: Path) -> Path:
    """Dilated convolutions and ELU, as MeshNet: negative activations, zero-points."""
    b = Builder(2)
    x = b.add("Elu", b.conv("image", 1, 6, dilation=1), alpha=1.0)
    x = b.add("Elu", b.conv(x, 6, 6, dilation=2), alpha=1.0)
    b.conv(x, 6, 4, kernel=1)
    return b.save(path, "logits", 4)


def resized(path: Path) -> Path:
    """MaxPool, trilinear Resize, concat and InstanceNormalization, a residual add, a sigmoid gate."""
    b = Builder(3)
    x = b.conv("image", 1, 6)
    scale, shift = b.weight(6), b.weight(6)
    x = b.add("Relu", b.add("InstanceNormalization", x, scale, shift))
    pooled = b.add("MaxPool", x, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    deep = b.add("Add", b.conv(pooled, 6, 6), pooled)
    b.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "scales"))
    up = b.add("Resize", deep, "", "scales", mode="linear", coordinate_transformation_mode="half_pixel")
    gated = b.add("Mul", up, b.add("Sigmoid", up))
    joined = b.add("Concat", x, gated, axis=1)
    b.conv(joined, 12, 3, kernel=1)
    return b.save(path, "logits", 3)


def attention(path: Path) -> Path:
    """One transformer block on 4 x 6 x 5 tokens of 8 features: two products of activations, LayerNormalization, GELU."""
    b = Builder(4)
    x = b.conv("image", 1, 8, kernel=1, stride=2)
    tokens, features = 4 * 6 * 5, 8
    b.weights += [
        numpy_helper.from_array(np.array(values, np.int64), name)
        for name, values in (("flat", [1, features, tokens]), ("grid", [1, features, 4, 6, 5]))
    ]
    t = b.add("Transpose", b.add("Reshape", x, "flat"), perm=[0, 2, 1])
    q, k, v = (b.add("MatMul", t, b.weight(features, features)) for _ in range(3))
    scores = b.add("Softmax", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 2, 1])), axis=-1)
    t = b.add("LayerNormalization", b.add("Add", t, b.add("MatMul", scores, v)), b.weight(features), b.weight(features))
    t = b.add("Gelu", b.add("MatMul", t, b.weight(features, features)))
    back = b.add("Reshape", b.add("Transpose", t, perm=[0, 2, 1]), "grid")
    b.add("ConvTranspose", back, b.weight(features, 3, 2, 2, 2), b.weight(3), strides=[2, 2, 2])
    return b.save(path, "logits", 3)


def rolled(path: Path) -> Path:
    """What else the zoo has: PReLU, Pad, Slice and Concat (Swin's roll), Gather, AveragePool, nearest Resize."""
    b = Builder(5)
    x = b.add("PRelu", b.conv("image", 1, 8, stride=2), b.weight(8, 1, 1, 1))
    b.weights += [
        numpy_helper.from_array(np.array(values), name)
        for name, values in {
            "pads": [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            "zero": [0],
            "one": [1],
            "two": [2],
            "end": [99],
            "z": [4],
            "order": [3, 1, 0, 2, 7, 5, 6, 4],
        }.items()
    ]
    x = b.add("Pad", x, "pads")
    x = b.add("Concat", b.add("Slice", x, "one", "end", "two"), b.add("Slice", x, "zero", "one", "two"), axis=2)
    x = b.add("Gather", b.add("Slice", x, "one", "end", "z"), "order", axis=1)
    mean = b.add("AveragePool", x, kernel_shape=[3, 3, 3], pads=[1] * 6, count_include_pad=1)
    x = b.add("Add", b.conv(x, 8, 8), mean)
    b.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "scales"))
    near = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    b.conv(b.add("Resize", x, "", "scales", **near), 8, 3, kernel=1)
    return b.save(path, "logits", 3)


NETWORKS = {"unet": unet, "meshnet": meshnet, "resized": resized, "attention": attention, "rolled": rolled}


def with_batch(path: Path, batch: int) -> Path:
    """The file of a fully convolutional network, changed to take so many windows at a time."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)
    return path


def windows(number: int, seed: int = 0, shape: tuple[int, ...] = (1, *WINDOW)) -> np.ndarray:
    """Smooth images between 0 and 1: (number, C, X, Y, Z) float32."""
    random = np.random.default_rng(seed).random((number, *shape)).astype(np.float32)
    smooth = random + np.roll(random, 1, -1) + np.roll(random, 1, -2) + np.roll(random, 1, -3)
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.float32)
