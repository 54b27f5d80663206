"""What each runtime wants from a Q/DQ graph. One line a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptq3d.errors import OptionError

# operators that only move or select values: quantizing before or behind them is the same
MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace", "SpaceToDepth", "Identity"}
)


@dataclass(frozen=True)
class Target:
    """One runtime's rules.

    Args:
        name: what `--target` takes.
        operators: the operators that run in INT8 there.
        symmetric: activations as int8 with zero-point 0 everywhere; otherwise uint8 with a zero-point.
        why: where the rules come from.
    """

    name: str
    operators: frozenset[str]
    symmetric: bool
    why: str


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "openvino",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            False,
            "x86 multiplies u8 activations with s8 weights (VNNI); concat and pooling stay in u8 where scales are equal",
        ),
        Target(
            "tensorrt",
            frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
            True,
            "TensorRT developer guide, explicit quantization: int8, zero-point 0, Q/DQ on all inputs of weighted layers",
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
