"""Which operators TensorRT's ONNX parser has, on which types, and what it does not take of them.

`onnx-tensorrt` below is the parser's repository, read at its tag for 10.1; `Changelog` its docs/Changelog.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.node_rules import (
    Found,
    Setting,
    Version,
    is_stored,
    maker,
    number,
    numbers,
    on,
    operand,
    rank_of,
    tensors,
    text,
    type_of,
)
from ptq3d.graphs.passes import QDQ

NEWEST_OPSET = 24
MOST_AXES = 8
MOST_ELEMENTS = 2**31 - 1
REWRITE = "rewrite it in the network and export it again"

HALVES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
FLOATS = HALVES | {ir.DataType.BFLOAT16}
NUMBERS = FLOATS | {ir.DataType.INT32, ir.DataType.INT64}
LOGICAL = frozenset({ir.DataType.BOOL})
_TYPES: Mapping[frozenset[ir.DataType], str] = {
    HALVES: "DeformConv GridSample InstanceNormalization Mish NonMaxSuppression NonZero RoiAlign",
    FLOATS: "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Dropout "
    "Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax "
    "IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu "
    "QuantizeLinear RNN RandomNormalLike RandomUniformLike Reciprocal Resize Round Scan Selu Sigmoid Sin Sinh Softmax Softplus "
    "Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    NUMBERS: "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg "
    "Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
    "Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    NUMBERS
    | LOGICAL: "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
    "RandomNormal RandomUniform Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    NUMBERS | LOGICAL | {ir.DataType.UINT8}: "Cast CastLike",
    LOGICAL: "And Not Or Xor",
    frozenset({ir.DataType.INT8}): "DequantizeLinear",
}
OPERATORS: Mapping[str, frozenset[ir.DataType]] = {
    name: types for types, names in _TYPES.items() for name in names.split()
}
# operator -> its first operand that the types are about, where that is not the first input
FIRST_OPERAND: Mapping[str, int] = {"Where": 1, "OneHot": 2}
# operator -> the operands that must be of one type, where these are not all
_ALIKE = (
    "Add Sub Mul Div Pow Max Min Mean Sum PRelu Clip Concat MatMul Gemm Conv ConvTranspose Equal Greater GreaterOrEqual Less "
    "LessOrEqual And Or Xor BatchNormalization InstanceNormalization LayerNormalization GroupNormalization"
)
ALIKE: Mapping[str, slice] = {"Where": slice(1, 3)} | dict.fromkeys(_ALIKE.split(), slice(None))
# operator -> (input that must be a constant of the file, first version that takes any)
FIXED_INPUTS: Mapping[str, tuple[int, Version | None]] = {
    "Slice": (3, None),
    "CumSum": (1, None),
    "Pad": (3, (10, 4)),
    "Squeeze": (1, (10, 7)),
    "Unsqueeze": (1, (10, 7)),
} | {name: (1, None) for name in OPERATORS if name.startswith("Reduce")}


@on()
def operator(node: ir.Node, _: Setting) -> str | None:
    """Every operator is ONNX's own and one that the parser has.

    Source: onnx-tensorrt docs/operators.md, "Operator Support Matrix".
    """
    if node.domain not in ("", "ai.onnx"):
        return f"{node.op_type} is of '{node.domain}', not of ONNX: {REWRITE}."
    return None if node.op_type in OPERATORS else f"TensorRT's ONNX parser has no {node.op_type}: {REWRITE}."


@on(*OPERATORS)
def operand_type(node: ir.Node, _: Setting) -> str | None:
    """What an operator computes with is of a type that the parser takes there.

    8-bit integers and doubles have rules of their own; InstanceNormalization is refused in BF16 though the table names it.

    Source: onnx-tensorrt docs/operators.md, "Supported Types"; onnxOpImporters.cpp, InstanceNormalization.
    """
    value = operand(node, FIRST_OPERAND.get(node.op_type, 0))
    kind, producer = type_of(value), maker(value)
    quantized = node.op_type in QDQ or (producer is not None and producer.op_type == "QuantizeLinear")
    if kind is None or kind == ir.DataType.DOUBLE or kind in OPERATORS[node.op_type] or quantized:
        return None
    names = _listed(OPERATORS[node.op_type])
    return f"{node.op_type} reads {kind.name}, TensorRT takes {names} there: put a Cast in front of it."


@on("Cast")
def cast(node: ir.Node, _: Setting) -> str | None:
    """A Cast goes to a type that TensorRT computes with; only QuantizeLinear makes 8-bit integers.

    Source: onnx-tensorrt docs/operators.md, Cast and the note on quantized types.
    """
    wanted = ir.DataType(number(node, "to"))
    if wanted in OPERATORS["Cast"] or wanted == ir.DataType.DOUBLE:
        return None
    return f"it casts to {wanted.name}, TensorRT casts to {_listed(OPERATORS['Cast'])}: {REWRITE}."


@on(*ALIKE)
def mixed_types(node: ir.Node, _: Setting) -> str | None:
    """All that one node computes with is of one type; the parser adds no casts.

    Whole exponents and bases of Pow have a rule of their own.

    Source: developer guide, "Strongly Typed Networks"; onnx-tensorrt importerUtils.cpp, elementwiseHelper.
    """
    kinds = dict.fromkeys(type_of(value) for value in node.inputs[ALIKE[node.op_type]])
    known = [kind for kind in kinds if kind is not None and (node.op_type != "Pow" or kind in FLOATS)]
    if len(known) < 2:
        return None
    return f"{node.op_type} mixes {' and '.join(kind.name for kind in known)}, TensorRT adds no casts: put one in front of it."


@on(*FIXED_INPUTS)
def constant_input(node: ir.Node, setting: Setting) -> str | None:
    """Axes are constants of the file.

    Source: onnx-tensorrt docs/operators.md, "Restrictions"; Changelog of 10.4 (Pad) and 10.7 (Squeeze, Unsqueeze).
    """
    index, since = FIXED_INPUTS[node.op_type]
    value = operand(node, index)
    if value is None or is_stored(value) or (since is not None and setting.version >= since):
        return None
    return f"the axes of {node.op_type} come from '{value.name}', TensorRT wants a constant: simplify the graph, or {REWRITE}."


@on("MaxPool", "AveragePool", "LpPool")
def pooling(node: ir.Node, _: Setting) -> str | None:
    """A pooling has no dilations and gives no indices, over at most three axes.

    Source: onnx-tensorrt docs/operators.md, AveragePool and MaxPool.
    """
    if any(dilation != 1 for dilation in numbers(node, "dilations")):
        return f"{node.op_type} has dilations {list(numbers(node, 'dilations'))}, TensorRT takes ones only: {REWRITE}."
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return f"TensorRT gives no indices of a {node.op_type}: {REWRITE}, with an up-sampling that needs none."
    if len(numbers(node, "kernel_shape")) > 3:
        return f"{node.op_type} pools {len(numbers(node, 'kernel_shape'))} axes, TensorRT at most three: {REWRITE}."
    return None


@on("Resize")
def resize(node: ir.Node, _: Setting) -> str | None:
    """A Resize is nearest, linear over the last three axes or cubic over the last two, without antialiasing or kept aspect.

    Source: onnx-tensorrt docs/operators.md, Resize; onnxOpImporters.cpp, Resize; NvInfer.h, InterpolationMode.
    """
    mode = text(node, "mode", "nearest")
    where = text(node, "coordinate_transformation_mode", "half_pixel")
    if where not in ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"):
        return f"Resize maps coordinates by {where}, which TensorRT has not: {REWRITE}, for example with half_pixel."
    if number(node, "antialias"):
        return f"Resize has antialiasing, which TensorRT has not: {REWRITE}, without it."
    if text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return f"Resize keeps the aspect ratio, which TensorRT does not: {REWRITE}, with sizes that do."
    most = {"linear": 3, "cubic": 2}.get(mode, MOST_AXES)
    before, after = shape_of(operand(node, 0)), shape_of(node.outputs[0])
    if before[:-most] == after[: len(before)][:-most]:
        return None
    return f"TensorRT resizes in {mode} mode along the last {most} axes only, this is {before} to {after}: {REWRITE}."


@on("DepthToSpace", "SpaceToDepth")
def depth_to_space(node: ir.Node, _: Setting) -> str | None:
    """DepthToSpace and SpaceToDepth are for four axes.

    Source: onnx-tensorrt onnxOpImporters.cpp, DepthToSpace and SpaceToDepth.
    """
    if rank_of(operand(node, 0)) in (4, None):
        return None
    return f"TensorRT has {node.op_type} of 4 axes only: write Reshape, Transpose, Reshape in its place."


@on("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
def automatic_padding(node: ir.Node, _: Setting) -> str | None:
    """Pads are written where padding is not automatic, and only there.

    Source: onnx-tensorrt importerUtils.cpp, getKernelParams; onnxOpImporters.cpp, ConvTranspose (output_padding).
    """
    mode, given = text(node, "auto_pad", "NOTSET"), ("pads", "output_padding")
    written = [name for name in given if name in node.attributes and (any(numbers(node, name)) or mode != "VALID")]
    if mode == "NOTSET" or not written or (written == ["output_padding"] and not any(numbers(node, "output_padding"))):
        return None
    return (
        f"{node.op_type} has auto_pad {mode} and {written[0]} beside it, of which TensorRT takes one: leave only pads."
    )


@on("ConvTranspose")
def output_padding(node: ir.Node, _: Setting) -> str | None:
    """Output padding beyond the end's pads comes behind the layer, and gets a bias only where that is a constant.

    Source: onnx-tensorrt onnxOpImporters.cpp, ConvTranspose.
    """
    bias = operand(node, 2)
    if bias is None or is_stored(bias) or not pads_behind(node):
        return None
    return "TensorRT leaves the bias out of the output padding, since it is no constant of the file: add it behind the layer."


def pads_behind(node: ir.Node) -> bool:
    """Whether a ConvTranspose has more output padding than pads at the end."""
    more = numbers(node, "output_padding")
    pads = numbers(node, "pads") or (0,) * 2 * len(more)
    return any(out > end for out, end in zip(more, pads[len(pads) // 2 :], strict=False))


@on("PRelu")
def slope(node: ir.Node, _: Setting) -> str | None:
    """The slope of a PRelu has the input's shape, with ones where it repeats, in front of which axes may be missing.

    Source: ONNX PRelu-16, unidirectional broadcasting; NvInfer.h, IParametricReLULayer.
    """
    x, slopes = shape_of(operand(node, 0)), shape_of(operand(node, 1))
    if rank_of(operand(node, 0)) is None or rank_of(operand(node, 1)) is None:
        return None
    ends = zip(reversed(x), reversed(slopes), strict=False)
    if len(slopes) <= len(x) and all(size in (1, wanted) for wanted, size in ends):
        return None
    return f"slopes {slopes} do not fit {x}: store them as (C, 1, 1, 1)."


@on("LayerNormalization", "BatchNormalization")
def normalization(node: ir.Node, _: Setting) -> str | None:
    """A LayerNormalization has a scale, and either gives only what it normalized.

    Source: onnx-tensorrt docs/operators.md, LayerNormalization; onnxOpImporters.cpp (10.1 takes 0 for a missing scale);
    onnxOpCheckers.cpp, BatchNormalization.
    """
    if operand(node, 1) is None:
        return f"{node.op_type} has no scale, for which TensorRT takes 0: write ones."
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return f"TensorRT gives the first output of {node.op_type} only: compute mean and variance by ReduceMean."
    if number(node, "training_mode"):
        return "the normalization is in training mode: export the network in evaluation mode."
    return None


@on("GroupNormalization")
def group_normalization(node: ir.Node, setting: Setting) -> str | None:
    """GroupNormalization with a scale for each channel (opset 21) needs TensorRT 10.9.

    Source: Changelog of 10.9.
    """
    if setting.opset < 21 or setting.version >= (10, 9):
        return None
    return "GroupNormalization of opset 21 needs TensorRT 10.9: write InstanceNormalization between two Reshape, then Mul and Add."


@on("Pad")
def pad_mode(node: ir.Node, _: Setting) -> str | None:
    """A Pad has one constant value, or is one of reflect, edge and wrap.

    Source: onnx-tensorrt onnxOpImporters.cpp, Pad.
    """
    mode, value = text(node, "mode", "constant"), operand(node, 2)
    if mode not in ("constant", "reflect", "edge", "wrap"):
        return f"TensorRT has no Pad of mode {mode}: {REWRITE}."
    if value is None or math.prod(shape_of(value)) == 1:
        return None
    return f"Pad has {shape_of(value)} values to pad with, TensorRT takes one: {REWRITE}."


@on("Pow")
def power(node: ir.Node, setting: Setting) -> str | None:
    """Whole exponents need TensorRT 10.8, whole bases 10.12.

    Source: Changelog of 10.8 and 10.12.
    """
    for index, name, since in ((1, "exponent", (10, 8)), (0, "base", (10, 12))):
        kind = type_of(operand(node, index))
        if kind in NUMBERS - FLOATS and setting.version < since:
            return f"Pow has a whole {name}, which needs TensorRT {since[0]}.{since[1]}: store it as a floating-point number."
    return None


@on("Gemm")
def gemm(node: ir.Node, _: Setting) -> str | None:
    """A Gemm multiplies two matrices, and its alpha and beta, which are FP32, are 1 beside other types.

    Source: onnx-tensorrt onnxOpImporters.cpp, Gemm.
    """
    if any(rank_of(operand(node, index)) not in (2, None) for index in (0, 1)):
        return "TensorRT's Gemm takes matrices of 2 axes only: write MatMul and Add."
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    if type_of(operand(node, 0)) in (ir.DataType.FLOAT, None) or all(factor == 1 for factor in factors):
        return None
    return (
        "alpha and beta of Gemm are FP32 beside matrices of another type: multiply them into the weights and the bias."
    )


def double(model: ir.Model, _: Version) -> Iterator[Found]:
    """No tensor is of doubles: TensorRT computes them in FP32 and clamps what does not fit.

    Source: onnx-tensorrt docs/operators.md, the note on DOUBLE.
    """
    for value in tensors(model):
        if type_of(value) == ir.DataType.DOUBLE:
            yield _place(value), f"'{value.name}' is of doubles, which TensorRT computes as FP32: store it as FP32."


def opset(model: ir.Model, _: Version) -> Iterator[Found]:
    """The opset is at most 24, the newest that TensorRT 11 documents.

    TensorRT 10.3 documents up to 20 and tries newer ones with a warning, so those are no violation.

    Source: onnx-tensorrt docs/operators.md for 10.1 and 11.1.
    """
    found = model.opset_imports.get("", 0)
    if found > NEWEST_OPSET:
        yield (
            "graph",
            f"opset {found} is newer than {NEWEST_OPSET}, TensorRT's newest: export the network for opset 20.",
        )


def axes(model: ir.Model, _: Version) -> Iterator[Found]:
    """No tensor has more than 8 axes.

    Source: NvInferRuntimeBase.h, Dims::MAX_DIMS.
    """
    for value in tensors(model):
        count = rank_of(value)
        if count is not None and count > MOST_AXES:
            yield _place(value), f"'{value.name}' has {count} axes, TensorRT takes at most {MOST_AXES}: {REWRITE}."


def elements(model: ir.Model, version: Version) -> Iterator[Found]:
    """No tensor has 2^31 elements or more before TensorRT 10.10.

    Source: release notes of TensorRT 10.10, large tensors.
    """
    for value in tensors(model) if version < (10, 10) else ():
        count = math.prod(shape_of(value))
        if count > MOST_ELEMENTS:
            yield (
                _place(value),
                f"'{value.name}' has {count} elements, 2^31 or more need TensorRT 10.10: choose a smaller --window.",
            )


def dynamic_shape(model: ir.Model, _: Version) -> Iterator[Found]:
    """All sides of an input are numbers but the batch: engines are built for one window.

    Source: NvInfer.h, addConvolutionNd and addPoolingNd (channels known at build time).
    """
    for value in model.graph.inputs:
        free = [size for size in list(value.shape or ())[1:] if not isinstance(size, int)]
        if value.name not in model.graph.initializers and (value.shape is None or free):
            yield (
                str(value.name),
                f"the shape {value.shape} of the input is free beyond its batch: fix it with --window X Y Z.",
            )


def _place(value: ir.Value) -> str:
    """The node that makes a tensor, or the tensor itself."""
    producer = value.producer()
    return str(value.name if producer is None else producer.name)


def _listed(types: Iterable[ir.DataType]) -> str:
    return ", ".join(sorted(kind.name for kind in types))
