"""A lowered program computes what the reference engine computes: integers bit for bit, floats within a step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from executor import Executor
from quantized import ZOO, Graph, Rest, freed, odd, of_integers, of_the_zoo, small, wanted, written

from networks import NETWORKS, windows
from ptq3d.engines.triton.lowering import lower
from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.steps import Attend, Convolve, Float, Move, Normalize, Pointwise, Upsample
from ptq3d.errors import EngineError

INTEGERS = ("unet", "meshnet")  # of NETWORKS: nothing between their layers is computed in floating point

# FP16 may round a value to the integer beside the right one, and layers behind it add such up; in FP32 (`wide`) only sums differ
AHEAD = 4


def answers(program: Program, x: np.ndarray, *, wide: bool = False) -> np.ndarray:
    batch = program.input.shape[0]
    run = Executor(program, wide=wide)
    return np.concatenate([run(x[first : first + batch]) for first in range(0, len(x), batch)])


def kinds(program: Program) -> Counter[str]:
    return Counter(type(step).__name__ for step in program.steps)


def share_within(steps: int, got: np.ndarray, truth: np.ndarray) -> float:
    """The part of the values that are no further apart than so many 127ths of the largest."""
    return float((np.abs(got - truth) <= steps * np.abs(truth).max() / 127).mean())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_small_networks_answer_as_the_reference_does(network: str, batch: int) -> None:
    path, x = small(network), windows(2, seed=8)
    program, truth = lower(freed(path) if batch > 1 else path, batch), wanted(path, x)
    got = answers(program, x)
    if network in INTEGERS:
        np.testing.assert_array_equal(got, truth)
        assert all(layer.precision == "int8" for layer in program.layers)
    assert share_within(1, answers(program, x, wide=True), truth) >= 0.999
    assert share_within(AHEAD, got, truth) >= 0.999
    np.testing.assert_array_equal(answers(program, x), got)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", ZOO)
def test_networks_of_the_zoo_answer_as_the_reference_does(network: str, batch: int) -> None:
    path, x = of_the_zoo(network), windows(2, seed=8, shape=(1, *ZOO[network]["window"]))
    program, truth = lower(freed(path) if batch > 1 else path, batch), wanted(path, x)
    assert share_within(1, answers(program, x, wide=True), truth) >= 0.999
    assert np.mean(answers(program, x).argmax(1) == truth.argmax(1)) > 0.98
    if network != "transunet":
        np.testing.assert_array_equal(answers(program, x), truth)


RESTS: tuple[Literal["fp16", "bf16"], ...] = ("fp16", "bf16")
IN_FLOAT = [("unet", "conv_0"), ("unet", "conv_7"), ("meshnet", "conv_2"), ("resized", "conv_0"), ("resized", "conv_4")]


def described(program: Program) -> list[tuple[str, str, str]]:
    return [(type(step).__name__, step.name.split("/")[0], step.out.dtype) for step in program.steps]


@pytest.mark.parametrize("rest", RESTS)
def test_casts_of_a_low_precision_rest_are_no_steps(rest: Literal["fp16", "bf16"]) -> None:
    """Normalizations between Casts run in the kernels in which they would run without; so do GroupNorms that Casts stand in."""
    for network in NETWORKS:
        assert described(lower(small(network, rest=rest), 1)) == described(lower(small(network), 1))
    for network in ("nnunet", "segresnet", "transunet"):
        assert described(lower(of_the_zoo(network, rest=rest), 1)) == described(lower(of_the_zoo(network), 1))


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize(("network", "layer"), IN_FLOAT)
def test_a_layer_in_floating_point_reads_what_is_not_rounded(network: str, layer: str, rest: Rest) -> None:
    """From FP16, in a kernel of its own that rounds what it makes; PyTorch runs nothing that it would not run without."""
    path, x = small(network, keep=(layer,), rest=rest), windows(2, seed=8)
    program, truth = lower(path, 1), wanted(path, x)
    (step,) = [step for step in program.steps if isinstance(step, Convolve) and step.x.dtype == "fp16"]
    plain = next(one for one in lower(small(network), 1).steps if one.name == step.name)
    assert step.out.dtype == plain.out.dtype
    assert [one.name for one in program.layers if one.precision == "fp16"] == [layer]
    alone = {step.op for step in lower(small(network), 1).steps if isinstance(step, Float)}
    assert {step.op for step in program.steps if isinstance(step, Float)} == alone
    if rest == "fp32":  # else the reference rounds to FP16 in front of integers where the engine does not
        assert share_within(1, answers(program, x, wide=True), truth) >= 0.999
    assert share_within(AHEAD, answers(program, x), truth) >= 0.999


@pytest.mark.parametrize("network", ["unet", "nnunet"])
def test_concats_of_u_nets_cost_no_copy(network: str) -> None:
    assert set(kinds(lower(of_the_zoo(network), 1))) <= {"Enter", "Convolve", "Upsample", "Normalize"}


def test_norms_take_the_sums_of_the_convolutions_in_front_of_them() -> None:
    program = lower(of_the_zoo("nnunet"), 1)
    made = {step.out: step.sums for step in program.steps if isinstance(step, Convolve | Upsample)}
    norms = [step for step in program.steps if isinstance(step, Normalize)]
    assert norms
    assert all(step.summed and step.sums == made[step.x] is not None for step in norms)
    assert all(program.buffers[step.sums].size == 2 * step.x.shape[1] for step in norms)


def groups(g: Graph) -> int:
    """A residual block with GroupNorm as exporters write it, rounded at its ends only; a branch that two things read."""
    x = g.q(g.conv8(g.q("image", 1 / 127), 1, 8))
    for _ in range(2):
        ones, zeros = g.constant(np.ones(4)), g.constant(np.zeros(4))
        flat = g.add("InstanceNormalization", g.reshape(x, 1, 4, -1), ones, zeros, epsilon=1e-4)
        back = g.reshape(flat, 1, 8, 8, 12, 10)
        scaled = g.add("Add", g.add("Mul", back, g.weight(8, 1, 1, 1)), g.weight(8, 1, 1, 1))
        deep = g.q(g.conv8(g.q(g.add("Relu", scaled)), 8, 8))
        x = g.q(g.add("Relu", g.add("Add", x, deep)), 1 / 16)
    g.conv8(x, 8, 3, 1)
    return 3


def attention(g: Graph) -> int:
    """Attention in floating point between INT8 linear layers; q is scaled, and there are two masks."""
    x = g.q(g.conv8(g.q("image", 1 / 127), 1, 24, 2, strides=[2, 2, 2], dilations=[1, 1, 1]))
    x = g.slice(g.slice(g.slice(x, 0, 4, 2), 0, 6, 3), 0, 5, 4)
    t = g.add("Transpose", g.reshape(x, 1, 24, 120), perm=[0, 2, 1])
    three = g.reshape(g.linear8(t, 24, 72), 1, 120, 3, 4, 6)
    three = g.add("Transpose", three, perm=[2, 0, 3, 1, 4])
    q, k, v = (g.add("Gather", three, g.constant(place, dtype=np.int64), axis=0) for place in range(3))
    k = g.add("Transpose", k, perm=[0, 1, 3, 2])
    scores = g.add("MatMul", g.add("Mul", q, g.constant(0.4)), k)
    scores = g.add("Add", g.add("Add", scores, g.weight(1, 4, 120, 120)), g.weight(1, 1, 120, 120))
    mixed = g.add("MatMul", g.add("Softmax", scores, axis=-1), v)
    mixed = g.q(g.reshape(g.add("Transpose", mixed, perm=[0, 2, 1, 3]), 1, 120, 24))
    t = g.q(g.add("Add", t, g.q(g.linear8(mixed, 24, 24))))
    t = g.q(g.add("LayerNormalization", t, g.weight(24), g.weight(24)))
    t = g.q(g.add("Gelu", g.linear8(t, 24, 24)))
    t = g.q(g.add("Add", t, g.weight(1, 120, 24)))
    image = g.reshape(g.add("Transpose", t, perm=[0, 2, 1]), 1, 24, 4, 6, 5)
    g.add("ConvTranspose", image, g.integers(24, 3, 2, 2, 2, axis=1), strides=[2, 2, 2])
    return 3


def windowed(g: Graph) -> int:
    """What Swin does on channels last: pad, roll, cut into windows, back; and patch merging."""
    x = g.q(g.conv8(g.q("image", 1 / 127), 1, 6))
    x = g.q(g.add("LayerNormalization", g.add("Transpose", x, perm=[0, 2, 3, 4, 1]), g.weight(6), g.weight(6)))
    x = g.add("Pad", x, g.constant([0, 0, 0, 0, 0, 0, 0, 3, 2, 0], dtype=np.int64))
    for axis in (1, 2, 3):
        x = g.add("Concat", g.slice(x, 2, 99, axis), g.slice(x, 0, 2, axis), axis=axis)
    x = g.add("Transpose", g.reshape(x, 1, 2, 4, 3, 5, 3, 4, 6), perm=[0, 1, 3, 5, 2, 4, 6, 7])
    x = g.q(g.linear8(g.reshape(x, 18, 80, 6), 6, 6))
    x = g.add("Transpose", g.reshape(x, 1, 2, 3, 3, 4, 5, 4, 6), perm=[0, 1, 4, 2, 5, 3, 6, 7])
    x = g.reshape(x, 1, 8, 15, 12, 6)
    x = g.slice(g.slice(x, 0, 12, 2), 0, 10, 3)
    pieces = [g.slice(g.slice(x, i, 99, 1, 2), j, 99, 2, 2) for i in (0, 1) for j in (0, 1)]
    x = g.q(g.linear8(g.add("Concat", *pieces, axis=-1), 24, 5))
    x = g.add("Transpose", x, perm=[0, 4, 1, 2, 3])
    scales = g.constant([1, 1, 2, 2, 1])
    x = g.q(g.add("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="align_corners"))
    g.conv8(x, 5, 3, 1)
    return 3


def mixed(g: Graph) -> int:
    """Tensors read rounded and not rounded, concats of other steps, groups, a float layer, a sum of two activations."""
    image = g.q("image", 1 / 127)
    x = g.add("LeakyRelu", g.conv8(image, 1, 8), alpha=0.2)
    rough = g.q(x, 1 / 8)
    part = g.q(g.conv8(rough, 8, 8, group=4), 1 / 20)
    rest = g.q(g.add("Add", part, g.q(g.add("Tanh", rough), 1 / 100)), 1 / 25)
    joined = g.q(g.add("Concat", rough, part, rest, axis=1), 1 / 15)
    pooled = g.q(g.add("AveragePool", joined, kernel_shape=[3, 3, 3], pads=[1] * 6), 1 / 40)
    gate = g.add("Sigmoid", g.add("Mul", x, g.constant(0.5)))
    float_layer = g.add("Conv", gate, g.weight(8, 8, 1, 1, 1))
    last = g.add("Concat", g.conv8(pooled, 24, 8), float_layer, g.add("Clip", part, g.constant(-0.5), ""), axis=1)
    g.conv8(g.q(last), 24, 4, 1)
    return 4


def odd_norms(g: Graph) -> int:
    """Channels that fill no row, normalized each for itself and in groups of two."""
    x = g.q(g.conv8(g.q("image", 1 / 127), 1, 10))
    for number in (10, 5):
        flat = g.reshape(x, 1, number, -1)
        ones, zeros = g.constant(np.ones(number)), g.constant(np.zeros(number))
        flat = g.add("InstanceNormalization", flat, ones, zeros, epsilon=1e-4)
        normed = g.add("Mul", g.reshape(flat, 1, 10, 8, 12, 10), g.weight(10, 1, 1, 1))
        normed = g.add("Add", normed, g.weight(10, 1, 1, 1))
        x = g.q(g.add("LeakyRelu", g.add("Add", normed, x), alpha=0.1), 1 / 20)
    return 10


def odd_rows(g: Graph) -> int:
    """Channels that fill no row in steps that treat every value alike, and as tokens."""
    x = g.q(g.conv8(g.q("image", 1 / 127), 1, 10))
    gate = g.q(g.add("Sigmoid", g.add("Mul", x, g.constant(0.5))), 1 / 127)
    pooled = g.q(g.add("AveragePool", gate, kernel_shape=[2, 2, 2], strides=[2, 2, 2]), 1 / 111)
    scales = g.constant([1, 1, 2, 2, 2])
    big = g.q(g.add("Resize", pooled, "", scales, mode="linear", coordinate_transformation_mode="half_pixel"), 1 / 103)
    flat = g.reshape(g.add("Transpose", g.reshape(big, 1, 10, -1), perm=[0, 2, 1]), 1, 960, 10)
    back = g.reshape(g.add("Transpose", g.q(g.linear8(flat, 10, 10)), perm=[0, 2, 1]), 1, 10, 8, 12, 10)
    g.conv8(g.q(g.add("Add", back, x)), 10, 3, 1)
    return 3


GRAPHS: dict[str, Callable[[Graph], int]] = {
    "groups": groups,
    "attention": attention,
    "windowed": windowed,
    "mixed": mixed,
    "odd": odd,
    "odd norms": odd_norms,
    "odd rows": odd_rows,
}


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_answer_as_the_reference_does(name: str, unsigned: bool) -> None:
    path, x = written(GRAPHS[name], unsigned=unsigned), windows(2, seed=8)
    program, truth = lower(path, 1), wanted(path, x)
    assert np.abs(truth).max() > 0.1
    least = 0.999 if name == "odd rows" else 1  # there two layers make more of a step that a resampled value is off
    assert share_within(1, answers(program, x, wide=True), truth) >= least
    assert share_within(AHEAD, answers(program, x), truth) >= 0.999


def test_rows_of_int8_images_start_where_wide_loads_do() -> None:
    """What fills a row up is a convolution's own, but in slices of a concat; floats and the answer have no such."""
    program = lower(written(odd), 1)
    made = {step.out.channels: step.out for step in program.steps if isinstance(step, Convolve | Upsample)}
    assert {channels: (view.pitch, view.spare) for channels, view in made.items()} == {
        5: (8, 3),
        19: (32, 13),
        30: (32, 2),
        9: (32, 0),
        14: (32, 0),  # joined to 23
        3: (3, 0),
    }


def test_group_norms_and_residual_sums_are_no_steps_of_their_own() -> None:
    assert kinds(lower(written(groups), 1)) == {"Enter": 1, "Convolve": 4, "Normalize": 2}


def test_attention_is_one_step_with_its_scale_and_masks() -> None:
    program = lower(written(attention), 1)
    (step,) = [step for step in program.steps if isinstance(step, Attend)]
    assert step.scale == pytest.approx(0.4)
    assert step.mask is not None
    assert step.mask.shape == (1, 4, 120, 120)
    assert not [step for step in program.steps if isinstance(step, Float)]
    floats = [layer for layer in program.layers if layer.precision == "fp16"]
    assert [layer.macs for layer in floats] == [4 * 120 * 120 * 6] * 2
    assert all("attention" in layer.why for layer in floats)


@pytest.mark.parametrize("mask", [(2, 1, 960), (960, 1), (1,), (960, 960)])
@pytest.mark.parametrize("front", [(2,), (2, 2), (2, 1, 2)])
def test_attention_of_any_number_of_axes(front: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Its answer is rounded as it leaves the kernel, though it is moved before it is rounded."""

    def build(g: Graph) -> int:
        x = g.q(g.conv8(g.q("image", 1 / 127), 1, 12))
        tokens = g.reshape(x, *front, 12 // int(np.prod(front)), 960)
        read = g.add("Transpose", tokens, perm=[*range(len(front)), len(front) + 1, len(front)])
        scores = g.add("Add", g.add("MatMul", read, tokens), g.weight(*mask))
        mixed = g.add("MatMul", g.add("Softmax", scores, axis=-1), read)
        turned = g.add("Transpose", mixed, perm=[*range(len(front)), len(front) + 1, len(front)])
        g.conv8(g.q(g.reshape(turned, 1, 12, 8, 12, 10)), 12, 3, 1)
        return 3

    path, x = written(build), windows(1)
    program, truth = lower(path, 1), wanted(path, x)
    (step,) = [step for step in program.steps if isinstance(step, Attend)]
    assert step.out.dtype == "int8"
    assert share_within(AHEAD, answers(program, x), truth) >= 0.999


def test_rows_are_copied_only_where_values_change_places() -> None:
    """Four times to roll along each axis and pad; to cut and to mend windows, and four pieces to merge."""
    moves = [step for step in lower(written(windowed), 1).steps if isinstance(step, Move)]
    assert len(moves) == 1 + 3 * 2 + 2 + 4


def test_what_is_not_int8_is_told_with_its_reason() -> None:
    program = lower(written(mixed), 1)
    grouped, real = [layer for layer in program.layers if layer.precision == "fp16"]
    assert (grouped.op, grouped.why, grouped.macs) == ("Conv", "it has groups", 8 * 2 * 27 * 8 * 12 * 10)
    assert (real.op, real.why, real.macs) == ("Conv", "its input is not quantized", 8 * 8 * 12 * 10 * 8)
    assert any("Conv" in note for note in program.notes)
    assert [type(step) for step in program.steps].count(Pointwise) < 12


def biased(g: Graph, x: str, read: str) -> str:
    """A convolution in floating point whose bias is the means of x."""
    bias = g.reshape(g.add("Mul", g.add("GlobalAveragePool", x), g.constant(20.0)), 4)
    return g.add("Conv", read, g.weight(4, 4, 3, 3, 3), bias, pads=[1] * 6)


def of_integers_with_means(g: Graph) -> int:
    x = g.q(g.add("Relu", g.conv8(g.q("image", 1 / 127), 1, 4)))
    biased(g, x, x)
    return 4


def of_reals_with_means(g: Graph) -> int:
    x = g.q(g.add("Relu", g.conv8(g.q("image", 1 / 127), 1, 4)))
    biased(g, x, g.add("Sigmoid", x))
    return 4


def of_a_constant_with_means(g: Graph) -> int:
    x = g.q(g.add("Relu", g.conv8(g.q("image", 1 / 127), 1, 4)))
    g.add("Add", biased(g, x, g.weight(1, 4, 8, 12, 10)), x)
    return 4


def by_a_mean(g: Graph) -> int:
    """By one number, a tensor without axes."""
    x = g.q(g.add("Relu", g.conv8(g.q("image", 1 / 127), 1, 4)))
    g.add("Mul", x, g.add("ReduceMean", x, keepdims=0))
    return 4


@pytest.mark.parametrize("build", [of_integers_with_means, of_reals_with_means, of_a_constant_with_means, by_a_mean])
def test_what_only_pytorch_can_stays_with_it(build: Callable[[Graph], int]) -> None:
    """A bias that is computed, a constant that is convolved."""
    path, x = written(build), windows(1)
    program, truth = lower(path, 1), wanted(path, x)
    assert any(isinstance(step, Float) and step.op in ("Conv", "ReduceMean") for step in program.steps)
    assert share_within(1, answers(program, x, wide=True), truth) == 1


def test_a_fixed_batch_is_no_other() -> None:
    with pytest.raises(EngineError, match=r"takes 1 window at a time, and 2 were asked for: use --batch 1"):
        lower(small("unet"), 2)


def test_macs_are_of_one_window_whatever_the_batch() -> None:
    path = small("attention")
    one, three = lower(path, 1), lower(freed(path), 3)
    assert [layer.macs for layer in one.layers] == [layer.macs for layer in three.layers]
    assert three.output.shape == (3, *one.output.shape[1:])


def test_an_unknown_operator_is_named() -> None:
    model = onnx.load(small("meshnet"))
    next(node for node in model.graph.node if node.op_type == "Elu").op_type = "Softsign"
    for node in model.graph.node:
        if node.op_type == "Softsign":
            del node.attribute[:]
    with pytest.raises(EngineError, match=r"does not know Softsign 'elu_1'"):
        lower(model, 1)


def moved(g: Graph) -> int:
    """Integers themselves are padded, pooled and cut, and a zero-point is left out."""
    step, zero = g.constant(1 / 40), g.constant(37, dtype=np.uint8)
    x = g.add(
        "QuantizeLinear",
        g.conv8(g.add("DequantizeLinear", g.add("QuantizeLinear", "image", step), step), 1, 5),
        step,
        zero,
    )
    x = g.add("Pad", x, g.constant([0, 0, 1, 0, 2, 0, 0, 0, 2, 1], dtype=np.int64), zero)
    x = g.add("MaxPool", x, kernel_shape=[2, 3, 3], strides=[1, 1, 1])
    x = g.add("DequantizeLinear", g.slice(x, 1, 11, 4), step, zero)
    g.conv8(g.add("Concat", x, g.slice(x, 0, 2, 1), axis=1), 7, 3)
    return 3


def test_integers_with_a_zero_point_are_moved_as_they_are() -> None:
    path, x = written(moved), windows(2, seed=8)
    program = lower(path, 1)
    assert {step.x.zero for step in program.steps if isinstance(step, Convolve)} == {-128, 37 - 128}
    np.testing.assert_allclose(
        answers(program, x), wanted(path, x), atol=1e-5
    )  # it sums behind a Slice in floating point


def test_integers_are_padded_with_nothing_but_their_zero_point() -> None:
    model = onnx.load(written(moved))
    (pad,) = [node for node in model.graph.node if node.op_type == "Pad"]
    del pad.input[2]
    with pytest.raises(EngineError, match=r"Pad 'pad_\d+' puts another number than the zero-point 37.*--target triton"):
        lower(model, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_an_answer_of_integers_is_as_the_file_has_it(dtype: type[np.generic]) -> None:
    def rounded(g: Graph) -> int:
        scale = g.constant(1 / 50), g.constant(90, dtype=dtype)
        g.add("DequantizeLinear", g.add("QuantizeLinear", g.conv8(g.q("image"), 1, 3), *scale), *scale)
        return 3

    path, x = of_integers(written(rounded)), windows(2, seed=8)
    program, truth = lower(path, 1), wanted(path, x)
    assert (program.output.dtype, program.output.zero) == ("int8", 90 - 128 if dtype is np.uint8 else 90)
    got = answers(program, x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, truth)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_activations_than_integers_of_one_scale_are_refused(dtype: type[np.generic]) -> None:
    def scaled(g: Graph) -> int:
        values = 3 if dtype is np.uint8 else 1
        scale = (g.constant([0.01] * values), g.constant([3] * values, dtype=dtype))
        x = g.add("QuantizeLinear", g.conv8(g.q("image"), 1, 3), *scale, axis=1)
        g.conv8(g.add("DequantizeLinear", x, *scale, axis=1), 3, 2)
        return 2

    with pytest.raises(EngineError, match=rf"not int8 or uint8 with one step.*{np.dtype(dtype)}.*--retarget triton"):
        lower(written(scaled), 1)


def test_it_needs_no_more_than_torch_numpy_and_onnx() -> None:
    kept_out = ("onnx_ir", "onnxscript", "monai", "nibabel", "openvino", "onnxruntime", "scipy")
    code = (
        f"import sys\nfor name in {kept_out}: sys.modules[name] = None\n"
        "from pathlib import Path\nfrom ptq3d.engines.triton.lowering import lower\n"
        f"print(len(lower(Path({str(small('unet'))!r}), 1).steps))"
    )
    src = Path(__file__).parents[3] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(src)}
    )
    assert int(done.stdout) == len(lower(small("unet"), 1).steps)
