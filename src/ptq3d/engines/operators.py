"""ONNX operators in torch, one small function each: what the torch and the reference engine compute with.

Every function takes the node's attributes and its input tensors (None where an optional one is absent) and gives its
first output. Source of each: the operator of that name in the ONNX specification, opset 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq3d.errors import GraphError

if TYPE_CHECKING:  # engines that have no onnx_ir compute with these, too
    import onnx_ir as ir

Operator = Callable[..., Tensor]
TORCH_TYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


# operator -> inputs that are numbers, not images: they stay on the host, and a compiler sees them as constants
NUMBERS: Mapping[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "ReduceMean": (1,),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
Numbers = Tensor | Sequence[float]


def _list(numbers: Numbers) -> list[Any]:
    return numbers.reshape(-1).tolist() if isinstance(numbers, Tensor) else list(numbers)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as plain Python values and tensors."""
    import onnx_ir as ir

    values: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        values[name] = torch.from_numpy(value.numpy().copy()) if isinstance(value, ir.TensorProtocol) else value
    return values


def _spatial(attributes: Mapping[str, Any], rank: int) -> tuple[list[int], list[int], list[int]]:
    strides = list(attributes.get("strides", [1] * rank))
    dilations = list(attributes.get("dilations", [1] * rank))
    pads = list(attributes.get("pads", [0] * 2 * rank))
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        raise GraphError(f"auto_pad '{attributes['auto_pad']}' has no torch form here. Export with explicit pads.")
    return strides, dilations, pads


def _pad(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """ONNX pads (all begins, then all ends) as torch's (last axis first, begin and end)."""
    rank = len(pads) // 2
    order = [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]
    return F.pad(x, order, value=value) if any(order) else x


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(attributes: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv."""
    rank = x.ndim - 2
    strides, dilations, pads = _spatial(attributes, rank)
    groups = attributes.get("group", 1)
    if pads[:rank] == pads[rank:]:
        return CONVOLUTIONS[rank](x, weight, bias, strides, pads[:rank], dilations, groups)
    return CONVOLUTIONS[rank](_pad(x, pads), weight, bias, strides, 0, dilations, groups)


def conv_transpose(attributes: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose."""
    rank = x.ndim - 2
    strides, dilations, pads = _spatial(attributes, rank)
    extra = list(attributes.get("output_padding", [0] * rank))
    if pads[:rank] != pads[rank:]:
        raise GraphError(f"ConvTranspose with uneven pads {pads} has no torch form. Export it with even pads.")
    return TRANSPOSED[rank](x, weight, bias, strides, pads[:rank], extra, attributes.get("group", 1), dilations)


def gemm(attributes: Mapping[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm."""
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    product = float(attributes.get("alpha", 1.0)) * (a @ b)
    return product if c is None else product + float(attributes.get("beta", 1.0)) * c


def max_pool(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    """MaxPool."""
    rank = x.ndim - 2
    strides, dilations, pads = _spatial(attributes, rank)
    padded = _pad(x, pads, -torch.inf) if any(pads) else x
    pool: Operator = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    return pool(padded, list(attributes["kernel_shape"]), strides, 0, dilations, bool(attributes.get("ceil_mode", 0)))


def average_pool(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    """AveragePool with even pads."""
    rank = x.ndim - 2
    strides, _, pads = _spatial(attributes, rank)
    pool: Operator = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    include = bool(attributes.get("count_include_pad", 0))
    ceil = bool(attributes.get("ceil_mode", 0))
    values = x.float() if x.device.type == "cpu" else x  # where PyTorch has no kernel for 16 bits
    return pool(values, list(attributes["kernel_shape"]), strides, pads[:rank], ceil, include).to(x.dtype)


def resize(
    attributes: Mapping[str, Any],
    x: Tensor,
    roi: Tensor | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
) -> Tensor:
    """Resize: nearest (asymmetric, floor) and linear (half_pixel or align_corners), as torch exports them."""
    if sizes is not None and len(sizes):
        size = [int(n) for n in _list(sizes)[2:]]
    elif scales is not None:
        size = [scaled(n, factor) for n, factor in zip(x.shape[2:], _list(scales)[2:], strict=True)]
    else:
        raise GraphError("Resize has neither scales nor sizes.")
    mode = attributes.get("mode", "nearest")
    corners = attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        if corners != "asymmetric" and any(n % o for n, o in zip(size, x.shape[2:], strict=True)):
            raise GraphError(f"Resize nearest with '{corners}' and a fractional factor has no torch form.")
        return F.interpolate(x, size, mode="nearest")
    if mode != "linear" or corners not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise GraphError(f"Resize mode '{mode}' with '{corners}' has no torch form. Use linear or nearest.")
    kind = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return F.interpolate(x, size, mode=kind, align_corners=corners == "align_corners")


def scaled(size: int, factor: float) -> int:
    """A size times a factor of a Resize, rounded down from float32 as ONNX Runtime does: 5 x 1.8 is 9, which in float64 is 8.99..."""
    fraction, exponent = math.frexp(size * factor)
    return int(math.ldexp(round(math.ldexp(fraction, 24)), exponent - 24))


def pad(
    attributes: Mapping[str, Any],
    x: Tensor,
    pads: Numbers,
    value: Numbers | None = None,
    axes: Numbers | None = None,
) -> Tensor:
    """Pad with a constant."""
    if attributes.get("mode", "constant") != "constant":
        raise GraphError(f"Pad mode '{attributes['mode']}' has no torch form here. Use constant.")
    amounts = [int(n) for n in _list(pads)]
    if axes is not None:
        full, rank = [0] * 2 * x.ndim, len(amounts) // 2
        for place, axis in enumerate(int(a) % x.ndim for a in _list(axes)):
            full[axis], full[axis + x.ndim] = amounts[place], amounts[place + rank]
        amounts = full
    return _pad(x, amounts, float(_list(value)[0]) if value is not None else 0.0)


def reshape(attributes: Mapping[str, Any], x: Tensor, shape: Numbers) -> Tensor:
    """Reshape; 0 keeps a size."""
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(_list(shape))])


def slice_(
    attributes: Mapping[str, Any],
    x: Tensor,
    starts: Numbers,
    ends: Numbers,
    axes: Numbers | None = None,
    steps: Numbers | None = None,
) -> Tensor:
    """Slice with positive steps."""
    chosen = [slice(None)] * x.ndim
    where = _list(axes) if axes is not None else range(len(starts))
    stride = _list(steps) if steps is not None else [1] * len(starts)
    for axis, first, last, step in zip(where, _list(starts), _list(ends), stride, strict=True):
        chosen[axis] = slice(first, last, step)
    return x[tuple(chosen)]


def instance_norm(attributes: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


def layer_norm(attributes: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """LayerNormalization."""
    axis = attributes.get("axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


def group_norm(attributes: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization, opset 21 (one scale per channel)."""
    return F.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def batch_norm(
    attributes: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """BatchNormalization in inference."""
    return F.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def reduce_mean(attributes: Mapping[str, Any], x: Tensor, axes: Numbers | None = None) -> Tensor:
    """ReduceMean, axes as attribute or input."""
    dims = _list(axes) if axes is not None else list(attributes.get("axes", range(x.ndim)))
    return x.mean(dims, keepdim=bool(attributes.get("keepdims", 1)))


def clip(attributes: Mapping[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clip."""
    return x.clamp(low, high) if low is not None or high is not None else x


def gelu(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    """Gelu."""
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


def squeeze(attributes: Mapping[str, Any], x: Tensor, axes: Numbers | None = None) -> Tensor:
    """Squeeze."""
    return x.squeeze() if axes is None else x.squeeze(tuple(_list(axes)))


def unsqueeze(attributes: Mapping[str, Any], x: Tensor, axes: Numbers) -> Tensor:
    """Unsqueeze."""
    for axis in sorted(a % (x.ndim + len(axes)) for a in _list(axes)):
        x = x.unsqueeze(axis)
    return x


OPERATORS: Mapping[str, Operator] = {
    "Add": lambda _, a, b: a + b,
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": lambda at, x: x.to(TORCH_TYPES[at["to"]]),
    "Clip": clip,
    "Concat": lambda at, *pieces: torch.cat(pieces, at["axis"]),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": lambda _, a, b: a / b,
    "Elu": lambda at, x: F.elu(x, at.get("alpha", 1.0)),
    "Erf": lambda _, x: torch.erf(x),
    "Expand": lambda _, x, shape: x * torch.ones(_list(shape), dtype=x.dtype, device=x.device),
    "Flatten": lambda at, x: x.flatten(at.get("axis", 1)),
    "Gather": lambda at, x, i: torch.index_select(x, at.get("axis", 0), i.reshape(-1)).reshape(
        [*x.shape[: at.get("axis", 0)], *i.shape, *x.shape[at.get("axis", 0) + 1 :]]
    ),
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": lambda _, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GroupNormalization": group_norm,
    "Identity": lambda _, x: x,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda at, x: F.leaky_relu(x, at.get("alpha", 0.01)),
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": max_pool,
    "Mul": lambda _, a, b: a * b,
    "PRelu": lambda _, x, slope: torch.where(x < 0, x * slope, x),
    "Pad": pad,
    "Pow": lambda _, a, b: torch.pow(a, b),
    "ReduceMean": reduce_mean,
    "Relu": lambda _, x: torch.relu(x),
    "Reshape": reshape,
    "Resize": resize,
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Slice": slice_,
    "Softmax": lambda at, x: torch.softmax(x, at.get("axis", -1)),
    "Floor": lambda _, x: torch.floor(x),
    "Sqrt": lambda _, x: torch.sqrt(x),
    "Squeeze": squeeze,
    "Sub": lambda _, a, b: a - b,
    "Tanh": lambda _, x: torch.tanh(x),
    "Transpose": lambda at, x: x.permute(at.get("perm") or list(reversed(range(x.ndim)))),
    "Unsqueeze": unsqueeze,
}
