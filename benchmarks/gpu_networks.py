"""The networks of benchmarks/gpu.py: graphs without their weights, which a seed gives back, and PyTorch's form of one.

Nothing but numpy, onnx and torch is needed here. What is large in a graph and no table is random, so that a file holds its seed
instead: INT8 weights are rounded normal numbers of every channel's whole range, FP32 weights the same integers times their steps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from ptq3d.engines.operators import NUMBERS, OPERATORS
from ptq3d.engines.triton.attention import Attention, attentions
from ptq3d.engines.triton.folding import fold, restore_groups
from ptq3d.engines.triton.network import Node, read_network

KEY = "ptq3d.benchmark"
SPREAD = 32.0  # standard deviation of INT8 weights, whose largest is 127
SMALL = 256  # values of a constant that is left alone


def told(model: onnx.ModelProto) -> dict[str, Any]:
    """What a stripped graph says of itself: seed, weights {name: output axis}, normal {name: [mean, spread]}, packed [name], classes."""
    found: dict[str, Any] = json.loads(next(one.value for one in model.metadata_props if one.key == KEY))
    return found


def _random(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def integers(name: str, shape: tuple[int, ...], axis: int, seed: int) -> np.ndarray:
    """INT8 weights, each output channel with a 127 in it."""
    values = _random(name, seed).standard_normal(shape, dtype=np.float32) * np.float32(SPREAD)
    q = np.clip(np.rint(values), -127, 127).astype(np.int8)
    first = [slice(None) if place == axis else 0 for place in range(len(shape))]
    q[tuple(first)] = 127
    return q


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with everything that `stripped` left out."""
    whole, notes = onnx.ModelProto(), told(model)
    whole.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in whole.graph.initializer}
    for name in notes["packed"]:
        stored[name].raw_data = zlib.decompress(stored[name].raw_data)
    for tensor in list(stored.values()):
        name, shape = tensor.name.removesuffix("/q"), tuple(tensor.dims)
        if name in notes["weights"]:
            axis = notes["weights"][name]
            values = integers(name, shape, axis, notes["seed"])
            if tensor.data_type == onnx.TensorProto.FLOAT:
                step = numpy_helper.to_array(stored[f"{name}/step"])
                values = values * step.reshape([-1 if place == axis else 1 for place in range(len(shape))])
            tensor.raw_data = values.tobytes()
        elif name in notes["normal"]:
            mean, spread = notes["normal"][name]
            values = _random(name, notes["seed"]).standard_normal(shape, dtype=np.float32)
            tensor.raw_data = (values * np.float32(spread) + np.float32(mean)).tobytes()
    read = {name for node in whole.graph.node for name in node.input}
    left = [tensor for tensor in whole.graph.initializer if tensor.name in read]
    del whole.graph.initializer[:]
    whole.graph.initializer.extend(left)
    return whole


def stripped(model: onnx.ModelProto, weights: Mapping[str, int], *, seed: int = 0, classes: int = 0) -> onnx.ModelProto:
    """The graph without its large constants.

    Args:
        model: FP32 or Q/DQ; the steps of its weights are stored as NAME/step.
        weights: name of a weight (without /q) -> axis of its output channels.
        seed: of what `filled` puts there.
        classes: of a head that was taken off, 0 where none was.
    """
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    notes: dict[str, Any] = {"seed": seed, "weights": {}, "normal": {}, "packed": [], "classes": classes}
    for tensor in slim.graph.initializer:
        name, values = tensor.name.removesuffix("/q"), numpy_helper.to_array(tensor)
        raw = values.tobytes()
        tensor.ClearField("float_data")
        tensor.ClearField("int64_data")
        tensor.raw_data = raw
        if name in weights:
            notes["weights"][name] = weights[name]
            tensor.raw_data = b""
        elif values.size > SMALL and len(packed := zlib.compress(raw, 9)) < len(raw) / 2:
            notes["packed"].append(tensor.name)
            tensor.raw_data = packed
        elif values.size > SMALL and values.dtype == np.float32:
            notes["normal"][name] = [float(values.mean()), float(values.std())]
            tensor.raw_data = b""
    kept = [one for one in slim.metadata_props if one.key != KEY]
    del slim.metadata_props[:]
    slim.metadata_props.extend(kept)
    slim.metadata_props.add(key=KEY, value=json.dumps(notes))
    return slim


def volume(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """(1, 1, X, Y, Z) float32 like an image of a body: blobs of several sizes and a little noise, mean 0, variance 1."""
    random = torch.Generator().manual_seed(seed)
    total = 0.1 * torch.randn(1, 1, *shape, generator=random)
    for size in (4, 16):
        coarse = torch.randn(1, 1, *(-(-one // size) + 1 for one in shape), generator=random)
        total += F.interpolate(coarse, shape, mode="trilinear", align_corners=True)
    return (total - total.mean()) / total.std()


class Network(torch.nn.Module):
    """An FP32 graph as PyTorch would be given it: GroupNorm and attention by its own functions, constants as buffers.

    Args:
        model: FP32, with its weights.
        batch: windows at a time.
        dtype: of weights and activations.
        last: weights of convolutions lie channels last.
    """

    def __init__(self, model: onnx.ModelProto, batch: int, dtype: torch.dtype = torch.float32, *, last: bool = False):
        super().__init__()
        network = restore_groups(fold(read_network(model, batch)))
        self.source, self.answer = network.input, network.output
        self.shape = network.shapes[network.input]
        self._places: dict[str, str] = {}
        self._types = dtype, last
        found = attentions(network)
        within = {node for one in found.values() for node in one.nodes}
        self._calls = []
        for node in network.nodes:
            if node in within:
                continue
            call = self._attention(found[node]) if node in found else self._operator(node, network.constants)
            self._calls.append((*call, node.out))
        uses = {name: place for place, (_, read, _) in enumerate(self._calls) for kind, name in read if kind == "value"}
        dead: dict[int, list[str]] = {}
        for name, place in uses.items():
            if name != self.answer:
                dead.setdefault(place, []).append(name)
        self._dead = [tuple(dead.get(place, ())) for place in range(len(self._calls))]

    def _operator(self, node: Node, constants: Mapping[str, np.ndarray]) -> tuple[Any, list[tuple[str, Any]]]:
        function, attributes = OPERATORS[node.op], dict(node.attributes)
        read: list[tuple[str, Any]] = []
        for place, name in enumerate(node.inputs):
            if name and name in constants and place in NUMBERS.get(node.op, ()):
                read.append(("number", tuple(constants[name].reshape(-1).tolist())))
            elif name and name in constants:
                read.append(("constant", self._constant(name, constants[name])))
            else:
                read.append(("value", name) if name else ("number", None))
        return (lambda *inputs: function(attributes, *inputs)), read

    def _attention(self, found: Attention) -> tuple[Any, list[tuple[str, Any]]]:
        read: list[tuple[str, Any]] = [("value", name) for name in (found.query, found.key, found.value)]
        if found.mask is not None:
            read.append(("constant", self._constant(f"{found.scores.out}/mask", found.mask)))

        def attend(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
            turned = key.transpose(-1, -2)
            return F.scaled_dot_product_attention(query, turned, value, attn_mask=mask, scale=found.scale)

        return attend, read

    def _constant(self, name: str, values: np.ndarray) -> str:
        if name not in self._places:
            dtype, last = self._types
            tensor = torch.from_numpy(np.array(values))
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            self._places[name] = f"c{len(self._places)}"
            laid = tensor.to(memory_format=torch.channels_last_3d) if last and tensor.ndim == 5 else tensor
            self.register_buffer(self._places[name], laid)
        return self._places[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The answer to (N, C, X, Y, Z) float32, in the type of the network."""
        dtype, last = self._types
        x = x.to(dtype, memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        values = {self.source: x}
        for (function, read, out), dead in zip(self._calls, self._dead, strict=True):
            inputs = [
                values[one] if kind == "value" else getattr(self, one) if kind == "constant" else one
                for kind, one in read
            ]
            values[out] = function(*inputs)
            for name in dead:
                del values[name]
        return values[self.answer]
