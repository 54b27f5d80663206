"""What TensorRT's engine inspector says of the layers of a graph.

Layouts differ: TensorRT 10 writes "Format/Datatype" in one text, 11 splits it; layers of its own compiler have no weights; fused
ones carry the names of all ONNX nodes in "Metadata", older ones only in "Name".

Source: TensorRT developer guide, "Engine Inspector"; TensorRT 11 migration guide, "IEngineInspector".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptq3d.engines.base import LayerReport
from ptq3d.errors import EngineError

Found = Mapping[str, Any]
# in texts of types and formats; longer names first, since they hold shorter ones
NAMES = (
    ("bfloat16", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"), ("float16", "fp16"), ("half", "fp16"), ("int8", "int8"),
    ("fp32", "fp32"), ("float32", "fp32"), ("float", "fp32"),
)  # fmt: skip
# in names of kernels: what they multiply
TACTICS = (
    (re.compile(r"i8i8|int8|imma|_i8|s8s8|_s8"), "int8"),
    (re.compile(r"bf16"), "bf16"),
    (re.compile(r"f16f16|fp16|hmma|h884|h1688|h16816|hgmma"), "fp16"),
    (re.compile(r"tf32"), "tf32"),
    (re.compile(r"f32f32|fp32|sgemm|scudnn|ffma"), "fp32"),
)


def reports(text: str, layers: Iterable[tuple[str, str, int]]) -> tuple[LayerReport, ...]:
    """What ran for each multiplying layer of the graph.

    Precision is that of the layer's weights, TF32 where the kernel of FP32 ones says so, else what the kernel's name says, else the
    type of what it reads; "unknown" where nothing tells, or no layer of the engine names it.

    Args:
        text: JSON of `get_engine_information`, of an engine built with detailed profiling.
        layers: (name, operator, multiply-accumulates) of the graph.

    Raises:
        EngineError: no JSON of layers.
    """
    try:
        content = json.loads(text, strict=False)  # names in "Metadata" are parted by control characters, perhaps bare
        listed = content["Layers"] if isinstance(content, dict) else None
    except (json.JSONDecodeError, KeyError):
        listed = None
    if not isinstance(listed, list):
        raise EngineError(f"TensorRT's inspector gives no layers: {text[:80]!r}.")
    found = [layer for layer in listed if isinstance(layer, dict)]  # names alone say nothing of types
    named = [frozenset(_graph_names(layer)) for layer in found]
    return tuple(LayerReport(name, *_ran(name, found, named), macs) for name, _, macs in layers)


def _ran(name: str, found: Sequence[Found], named: Sequence[frozenset[str]]) -> tuple[str, str]:
    """(what TensorRT calls it, precision); of several layers that name it the one that multiplies."""
    holding = [layer for layer, names in zip(found, named, strict=True) if name in names]
    holding.sort(key=lambda layer: _is_move(layer))
    if not holding:
        return "not in the engine's report", "unknown"
    layer = holding[0]
    return " ".join(filter(None, (str(layer.get("LayerType", "")), str(layer.get("TacticName", ""))))), precision(layer)


def _graph_names(layer: Found) -> Iterator[str]:
    """Names of the ONNX nodes that a layer holds."""
    metadata = str(layer.get("Metadata", ""))
    yield from (part.removesuffix("]") for part in re.split(r"[\x1e\x1f]*\[ONNX Layer: ", metadata)[1:])
    name = str(layer.get("Name", ""))
    yield name
    yield from re.split(r" \+ |, |[()]", name)


def _is_move(layer: Found) -> bool:
    return layer.get("LayerType") in ("Reformat", "NoOp", "Shuffle") or "Reformatting" in str(layer.get("Name", ""))


def precision(layer: Found) -> str:
    """The precision in which one layer of the inspector's report multiplies."""
    weights: Found = next((layer[key] for key in ("Weights", "ConvWeights") if isinstance(layer.get(key), dict)), {})
    said = _type(str(weights.get("Type", "")))
    tactic = str(layer.get("TacticName", "")).lower()
    if said is not None:
        return "tf32" if said == "fp32" and "tf32" in tactic else said
    for pattern, name in TACTICS:
        if pattern.search(tactic):
            return name
    inputs = layer.get("Inputs") or [{}]
    return _type(_type_text(inputs[0])) or "unknown"


def _type_text(tensor: Any) -> str:
    """What says a tensor's type, in any of the layouts."""
    if not isinstance(tensor, dict):
        return ""
    return next(
        (str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype", "Format") if key in tensor), ""
    )


def _type(text: str) -> str | None:
    lower = text.lower()
    return next((name for part, name in NAMES if part in lower), None)
