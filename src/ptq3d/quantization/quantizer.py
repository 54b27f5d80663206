"""From an FP32 graph and what calibration saw of it to a Q/DQ graph: the steps in their order, each of which can be left out."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from ptq3d.graphs.constants import round_added_constants
from ptq3d.graphs.low_precision import low_precision
from ptq3d.graphs.split_head import head_layer_of
from ptq3d.quantization import equalization, planning, qdq, rounding, second_terms, smoothing
from ptq3d.quantization.observation import Observations
from ptq3d.quantization.targets import get_target


@dataclass(frozen=True)
class Recipe:
    """The user's whole choice of quantization; all else follows from graph, data and target.

    Args:
        target: the runtime to place Q/DQ for.
        calibration_method: how a range is drawn from what was seen.
        equalize: scale channels so that all use the 8 bits.
        second_terms: the share of the network's work that may be spent on its most sensitive layers; 0 for none.
        rounding: "gptq" or "nearest".
        keep: glob patterns of layers that stay in floating point.
        high_precision_dtype: "fp32", "fp16" or "bf16": the type of whatever is no integer, in the file itself.
    """

    target: str = "openvino"
    calibration_method: str = "mse"
    equalize: bool = True
    second_terms: float = second_terms.COST
    rounding: str = "gptq"
    keep: tuple[str, ...] = ()
    high_precision_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


HEAD = "the late head: it runs once a voxel, not once a window"


@dataclass(frozen=True)
class Quantized:
    """What `quantize_graph` made.

    Args:
        model: the Q/DQ graph.
        plan: that it was written from.
        kept: layers in floating point, with the reason.
        split: layers that read two terms.
        mended: layers in floating point since 8 bits hurt them; `kept` has them, too.
        int8_mac_share: of the multiplications of this graph, 0..1, as planned.
    """

    model: ir.Model
    plan: planning.Plan
    kept: Mapping[str, str]
    split: tuple[str, ...]
    mended: tuple[str, ...]
    int8_mac_share: float


def quantize_graph(
    model: ir.Model, seen: Observations, recipe: Recipe, rounded: rounding.Rounded | None = None
) -> Quantized:
    """`model` as a Q/DQ graph, by a recipe.

    Args:
        model: a simplified FP32 graph; it is left as it is.
        seen: what `calibration.observe` saw of it, without any `keep`.
        recipe: what to do.
        rounded: weights known from other recipes for this network.

    Raises:
        OptionError: a pattern matches no layer, or no layer is left.
        CalibrationError: a tensor whose range reaches beyond the recipe's floating-point type.
        GraphError: the graph cannot be written in that type.
    """
    model, target, dtype = model.clone(), get_target(recipe.target), recipe.high_precision_dtype
    if recipe.equalize:
        placement = planning.place(model, target)
        done = equalization.equalize(model, placement, seen.tensors, multiplied=target.factors)
        seen = seen.scaled(done.tensors, done.layers)
        placement = planning.place(model, target)  # the two steps that follow rename nothing
        smoothed = smoothing.smooth(model, placement, seen.tensors)
        seen = seen.scaled(smoothed.tensors, smoothed.layers)
        levelled = equalization.level(model, placement, seen.tensors)
        seen = seen.scaled(levelled.tensors, levelled.layers)
    head = head_layer_of(model)
    keep = recipe.keep if head is None else (*recipe.keep, glob.escape(head))
    late = () if head is None else (head,)
    placement = planning.place(model, target, keep=keep, rounded=late)
    ranges = seen.ranges(placement, method=recipe.calibration_method, symmetric=target.symmetric)
    plan = planning.in_type(planning.plan(model, placement, ranges, target), dtype)
    kept, mended = {**placement.kept, **({} if head is None else {head: HEAD})}, second_terms.Mended()
    if recipe.second_terms and target.mending is not None and (dtype != "fp32" or target.rest == "fp32"):
        found = second_terms.noises(model, plan, seen, target.mending)
        mended = second_terms.choose(found, model, target.mending, cost=recipe.second_terms, integers=len(plan.layers))
        kept |= {layer.layer: "too sensitive for 8 bits" for layer in mended.floating}
        scales = second_terms.split(model, mended.split, seen, symmetric=target.symmetric, dtype=dtype)
        seen = second_terms.split_rows(seen, mended.split, scales)
        keep = (*keep, *(glob.escape(layer.layer) for layer in mended.floating))
        placement = planning.place(model, target, keep=keep, rounded=late)
        plan = planning.in_type(planning.plan(model, placement, ranges, target, given=scales), dtype)
    if recipe.rounding == "gptq":
        rounding.round_weights(model, plan, seen.layers, rounded)
    round_added_constants(model)
    share = planning.int8_mac_share(model, plan)
    split, floating = ([layer.layer for layer in layers] for layers in (mended.split, mended.floating))
    written = qdq.write(model, plan)
    if dtype != "fp32":
        low_precision(written, dtype)
    return Quantized(written, plan, kept, tuple(split), tuple(floating), share)
