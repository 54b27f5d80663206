"""What each runtime wants from a Q/DQ graph. One line a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ptq3d.errors import OptionError

# operators that only move or select values: quantizing before or behind them is the same
MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace", "SpaceToDepth", "Identity"}
)
# of these, the ones that leave every value where it is
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# functions of one value, which a kernel computes on its way out
ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Sigmoid", "Tanh", "Clip"})


@dataclass(frozen=True)
class Prices:
    """What a runtime takes for a layer that 8 bits hurt, in INT8 multiplications.

    Args:
        value: of an INT8 value that an operator which does not multiply writes and reads.
        terms: of a float value written, read and written again as two terms; None where two terms are never worth it.
        float_value: of a value written in floating point and read again where it was INT8.
        float_mac: of a multiplication in floating point, beyond the INT8 one.
        float_share: of the network's multiplications that may leave INT8 this way.
        float_bytes: of a weight in floating point, beyond the INT8 one.
        weights: the share of the network's INT8 weights that may be added in bytes.
        lanes: (input, output) channels that INT8 takes at once; fewer take as long.
        most: the share of the network's work that may be spent where the user says nothing.
        as_good: less is enough where the labels disagree at most that many times as much; the cheaper mending, the closer to 1.
    """

    value: float
    terms: float | None
    float_value: float
    float_mac: float
    float_share: float
    float_bytes: int
    weights: float
    lanes: tuple[int, int]
    most: float
    as_good: float


@dataclass(frozen=True)
class Target:
    """One runtime's rules.

    Args:
        name: what `--target` takes.
        operators: the operators that run in INT8 there.
        symmetric: activations as int8 with zero-point 0 everywhere; otherwise uint8 with a zero-point.
        why: where the rules come from.
        outputs: operators whose outputs are quantized too, between the first INT8 layer and the last weighted one; then
            everything reads the dequantized tensors, but for layers in floating point (see `rest`). "Concat": its inputs share a
            scale, whoever reads it.
        fused: operators that run as one with the one in front of them: only the output of the last is quantized. "Add" and "Mul":
            of a constant for each channel, behind a layer or a normalization; "Reshape": back from groups to channels, there.
        factors: channel scales that no layer takes may stay a multiplication, which runs with what is in front of it.
        selects: operators that give values of their input, of whose scale their output is where both are quantized.
        products: products of two activations run in INT8, too; otherwise what only they read stays in floating point with them.
        residual: the other branch of an Add behind an INT8 layer is quantized too.
        reads: operators that read INT8 straight out of an INT8 layer, though they do not multiply; zero-point 0, since they take
            any shift of a channel away and OpenVINO does not know it.
        sums: layers that an Add behind them runs inside of, where both its inputs are INT8; whoever reads the sum reads INT8, too.
        unshifted: layers that run in INT8 only where what they read has zero-point 0.
        direct: layers must read a DequantizeLinear itself: concats and moves in front of them are quantized behind, too.
        channel_steps: QuantizeLinear may have a step for each channel where DequantizeLinear has one: channel scales are free.
        rest: the type of what stays in floating point where the user says nothing; sensitive layers are mended in it only. Where `outputs`
            are quantized, layers in floating point read what is not, if the target mends any.
        group_multiple: a group of an INT8 convolution reads and makes a multiple of so many channels.
        mending: what it costs there to mend a sensitive layer; None where none is mended.
        shuffles: a ConvTranspose with kernel = stride is written as a 1x1x1 convolution and a shuffle of its channels.
    """

    name: str
    operators: frozenset[str]
    symmetric: bool
    why: str
    outputs: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    residual: bool = False
    reads: frozenset[str] = frozenset()
    unshifted: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()
    direct: bool = False
    channel_steps: bool = False
    factors: bool = True
    selects: frozenset[str] = frozenset()
    products: bool = True
    rest: Literal["fp32", "fp16"] = "fp32"
    group_multiple: int = 1
    mending: Prices | None = None
    shuffles: bool = False


# with an FP16 rest: tensor cores multiply INT8 twice as fast as FP16, about 300 times in the time of a byte; INT8 volumes are packs of
# 32 channels; two terms would be made by an operator of its own
TENSOR_CORES = Prices(
    value=600,
    terms=None,
    float_value=600,
    float_mac=1.0,
    float_share=0.5,
    float_bytes=1,
    weights=0.05,
    lanes=(32, 32),
    most=0.4,
    as_good=1.05,
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "openvino",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            False,
            "x86 multiplies u8 activations with s8 weights (VNNI); concat and pooling stay in u8 where scales are equal; "
            "a normalization reads INT8 faster, and turning its groups in float costs as much as a convolution; a ConvTranspose "
            "that reads a zero-point runs in float; an Add runs inside the convolution in front where both its inputs are INT8",
            reads=frozenset({"InstanceNormalization"}),
            unshifted=frozenset({"ConvTranspose"}),
            sums=frozenset({"Conv"}),
            channel_steps=True,
            # measured on processors with VNNI; files stay 3.8 times smaller
            mending=Prices(
                value=150,
                terms=500,
                float_value=300,
                float_mac=4.5,
                float_share=0.05,
                float_bytes=3,
                weights=0.018,
                lanes=(4, 16),
                most=0.2,
                as_good=1.25,
            ),
        ),
        Target(
            "tensorrt",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            True,
            "TensorRT developer guide, explicit quantization: int8, zero-point 0, Q/DQ on all inputs of weighted layers "
            "and on the residual branch of an Add, which then runs inside the convolution; a 3D ConvTranspose may leave INT8 "
            "there whatever its Q/DQ say (TensorRT issue 4668)",
            residual=True,
            rest="fp16",
            group_multiple=4,
            mending=TENSOR_CORES,
            shuffles=True,
        ),
        Target(
            "onnxruntime",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            False,
            "ONNX Runtime makes a QLinearConv of DQ, Conv (Relu), Q only. ConvTranspose runs in float there, but one with FP32 "
            "weights between Q/DQ gets one INT8 step for all its weights from ONNX Runtime itself, which is worse than ours",
            outputs=frozenset({"Conv", "Gemm", "MatMul"}),
            fused=frozenset({"Relu"}),
            direct=True,
        ),
        Target(
            "triton",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            False,
            "kernels of our own, which pad with the zero-point and start their sums at minus zero-point times the weights; every "
            "tensor between the first and the last layer stays INT8, but for what layers in FP16 read and for attention, "
            "which one kernel computes in FP16 without storing its scores",
            outputs=frozenset(
                {"Conv", "ConvTranspose", "Gemm", "MatMul", "Concat", "Add", "Sub", "Mul", "Resize", "AveragePool"}
                | {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"}
                | ACTIVATIONS
            ),
            fused=ACTIVATIONS | {"Add", "Mul", "Reshape"},
            factors=False,
            selects=frozenset({"Pad", "Slice"}),
            products=False,
            rest="fp16",
            mending=TENSOR_CORES,
        ),
    )
}


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in TARGETS:
        raise OptionError(f"no target '{name}'. The targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]
