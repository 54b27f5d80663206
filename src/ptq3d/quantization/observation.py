"""What calibration saw of a network, in memory that does not grow with the windows: from one pass over them, or from a few over
parts of a large network.

Of each tensor: the exact extremes of every channel, and its values at sampled positions. Of each weighted layer: moments of the
rows that it multiplies, and a few of those rows. All later steps (channel scales, ranges, second terms, rounding) are computed
from this, so that no step needs another pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.errors import CalibrationError
from ptq3d.graphs.layers import WEIGHT_AXIS, shape_of
from ptq3d.quantization.observers import RANGE_METHODS, Range, Statistics
from ptq3d.quantization.planning import Placement
from ptq3d.quantization.rows import Gram, has_rows, pieces

VALUES = 1 << 20  # sampled values of a tensor, all windows together
POSITIONS = 1 << 15  # sampled positions of a tensor, all windows together
EDGES = 0.5  # the share of positions that lies at borders between labels, where INT8 can move a voxel
NEAR = 3  # voxels around such a border
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorSeen:
    """What was seen of a tensor (N, C, ...), or (..., C) where a product reads it or LayerNormalization makes it.

    Args:
        low: (C,) float32, smallest value of each channel, as BF16 arithmetic gives it.
        high: (C,) float32, largest.
        values: (n, C) float32, the tensor at n sampled positions.
    """

    low: Floats
    high: Floats
    values: Floats

    def scaled(self, factors: Floats) -> TensorSeen:
        """Of the tensor whose channels are multiplied by `factors` > 0."""
        return TensorSeen(self.low * factors, self.high * factors, self.values * factors)


@dataclass(frozen=True)
class Observations:
    """All that was seen, by name.

    Args:
        tensors: activation tensor -> what was seen.
        layers: weighted layer -> moments of its rows.
    """

    tensors: Mapping[str, TensorSeen]
    layers: Mapping[str, Gram]

    def scaled(self, tensors: Mapping[str, tuple[str, Floats]], layers: Mapping[str, Floats]) -> Observations:
        """Of the network after `equalization.equalize` scaled its channels; see `Equalized`."""
        renamed = {
            tensors[name][0] if name in tensors else name: seen.scaled(tensors[name][1]) if name in tensors else seen
            for name, seen in self.tensors.items()
        }
        grams = {name: gram.scaled(layers[name]) if name in layers else gram for name, gram in self.layers.items()}
        return Observations({**self.tensors, **renamed}, grams)  # an inserted factor leaves the tensor itself as it was

    def ranges(self, placement: Placement, *, method: str, symmetric: bool) -> dict[str, Range]:
        """Tensor -> range; the inputs of one concat share theirs.

        Args:
            placement: which tensors are wanted.
            method: a name of `RANGE_METHODS`.
            symmetric: whether the ranges are for symmetric INT8.
        """
        ranges: dict[str, Range] = {}
        for group in placement.tensors:
            statistics = Statistics(", ".join(group), histogram=method != "max")
            for name in group:
                seen = self.tensors[name]
                statistics.see(seen.values)
                statistics.see_extremes(float(seen.low.min()), float(seen.high.max()))
            signed = symmetric or bool(placement.signed & set(group))
            ranges.update(dict.fromkeys(group, RANGE_METHODS[method](statistics, symmetric=signed)))
        return ranges


@dataclass(frozen=True)
class Part:
    """What is looked at in one run of the network.

    Args:
        tensors: whose values are kept.
        layers: whose rows are.
    """

    tensors: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


class Observer:
    """Takes in the values of one window after the other.

    Args:
        model: the simplified FP32 graph.
        placement: the tensors and layers to look at.
        windows: how many will be seen; the samples are spread over them.
        seed: of the positions that are looked at.
    """

    def __init__(self, model: ir.Model, placement: Placement, windows: int, *, seed: int = 0) -> None:
        chosen = set(placement.layers)
        self._logits = str(model.graph.outputs[0].name)
        self._generator = np.random.default_rng(seed)
        self._windows = max(windows, 1)
        self._names = [name for group in placement.tensors for name in group]
        nodes = [node for node in model.graph if node.op_type in WEIGHT_AXIS and node.name in chosen and has_rows(node)]
        self._grams = {str(node.name): Gram.empty(node, self._windows) for node in nodes}
        self._seen: dict[str, list[TensorSeen]] = {name: [] for name in self._names}
        made = [value for node in model.graph for value in node.outputs]
        self._bytes = {str(value.name): 4 * math.prod(shape_of(value)) for value in made}
        self._features_last, self._channels_first = _features_last(model), _channels_first(model)

    @property
    def tensors(self) -> list[str]:
        """The names that `see` wants."""
        return self.tensors_of(self.whole)

    @property
    def whole(self) -> Part:
        """All there is to see."""
        return Part(tuple(self._names), tuple(self._grams))

    def tensors_of(self, part: Part) -> list[str]:
        """The names that `see` wants for a part."""
        sources = [name for layer in part.layers for name in self._grams[layer].sources]
        return list(dict.fromkeys([*part.tensors, *sources, self._logits]))

    def parts(self, limit: int) -> list[Part]:
        """All there is to see in parts of at most `limit` bytes of tensors each, or of one layer or tensor where that is more."""
        units = [Part(tuple(gram.sources), (layer,)) for layer, gram in self._grams.items()]
        read = {name for unit in units for name in unit.tensors}
        units += [Part((name,)) for name in self._names if name not in read]
        found, taken = [Part()], set[str]()
        for unit in units:
            fresh = tuple(name for name in unit.tensors if name in self._seen and name not in taken)
            taken.update(fresh)
            joined = Part(found[-1].tensors + fresh, found[-1].layers + unit.layers)
            size = sum(self._bytes.get(name, 0) for name in self.tensors_of(joined))
            if size > limit and found[-1] != Part():
                found.append(Part(fresh, unit.layers))
            else:
                found[-1] = joined
        return found if len(found) > 1 else [self.whole]

    def see(self, values: Mapping[str, Floats], part: Part | None = None) -> None:
        """Take in one window.

        Args:
            values: name -> (1, C, X, Y, Z) or any other shape, float32.
            part: what to look at, one of `parts`; each window is shown once for each of them.

        Raises:
            CalibrationError: a tensor holds NaN or infinite values.
        """
        part, places = part or self.whole, _Places(values[self._logits], self._generator)
        for name in part.tensors:
            self._seen[name].append(self._tensor(name, values[name], places))
        for gram in (self._grams[layer] for layer in part.layers):
            gram.see([values[name] for name in gram.sources], places.draw)

    def _tensor(self, name: str, values: Floats, places: _Places) -> TensorSeen:
        features_last = name in self._features_last or (values.ndim != 5 and name not in self._channels_first)
        is_volume = values.ndim == 5 and len(values) == 1 and not features_last
        rows = _rows(values, features_last=features_last)
        low, high = rows.min(0), rows.max(0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            bad = int(values.size - np.isfinite(values).sum())
            raise CalibrationError(
                f"tensor '{name}' has no finite range: {bad} of {values.size} values of a window are NaN or infinite. The FP32 "
                f"network itself overflows there: check the intensity rule, or leave the layer in floating point with --keep."
            )
        number = max(min(POSITIONS, VALUES // rows.shape[1]) // self._windows, 1)
        if is_volume:
            drawn = np.ravel_multi_index(tuple(places.draw(values.shape[2:], number)), values.shape[2:])
        else:
            drawn = places.draw([len(rows)], number)[0]
        return TensorSeen(low, high, np.ascontiguousarray(rows[drawn]))

    def finish(self) -> Observations:
        """What was seen.

        Raises:
            CalibrationError: there was no window.
        """
        if any(not pieces for pieces in self._seen.values()):
            raise CalibrationError("there is no calibration window. Give at least one.")
        tensors = {
            name: TensorSeen(
                np.min([piece.low for piece in pieces], 0),
                np.max([piece.high for piece in pieces], 0),
                np.concatenate([piece.values for piece in pieces]),
            )
            for name, pieces in self._seen.items()
        }
        return Observations(tensors, dict(self._grams))


def _features_last(model: ir.Model) -> set[str]:
    """Tensors whose last axis counts features: products read it, LayerNormalization makes it."""
    read = {
        str(node.inputs[0].name)
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None
    }
    return read | {str(node.outputs[0].name) for node in model.graph if node.op_type == "LayerNormalization"}


def _channels_first(model: ir.Model) -> set[str]:
    """Tensors that convolutions read, straight or through concats."""
    convolutions = [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose")]
    return {name for node in convolutions for name in pieces(node.inputs[0])}


def _rows(values: Floats, *, features_last: bool) -> Floats:
    """(positions, channels), a view where it can be one."""
    if features_last:
        return values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return (
        np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
        if len(values) > 1
        else values.reshape(values.shape[1], -1).T
    )


class _Places:
    """Draws positions, part of them near borders between labels."""

    def __init__(self, logits: Floats, generator: np.random.Generator) -> None:
        self._generator = generator
        labels = logits[0].argmax(0) if logits.ndim == 5 else np.zeros((1, 1, 1), np.int64)
        border = np.zeros(labels.shape, bool)
        for axis in range(labels.ndim):
            differs = np.diff(labels, axis=axis) != 0
            border |= (
                np.concatenate([differs, np.zeros_like(np.take(differs, [0], axis))], axis) if differs.size else False
            )
        self._edges, self._sizes = np.argwhere(border), np.asarray(labels.shape)

    def draw(self, sizes: Sequence[int], number: int) -> npt.NDArray[np.int64]:
        """(3, number) positions on a grid of those sizes that covers the window."""
        shape = np.asarray(sizes)
        positions = self._generator.integers(0, shape, (number, len(shape)))
        near = int(number * EDGES) if len(self._edges) and len(shape) == len(self._sizes) else 0
        if near:
            edges = self._edges[self._generator.integers(0, len(self._edges), near)]
            moved = edges + self._generator.integers(-NEAR, NEAR + 1, edges.shape)
            positions[:near] = np.clip(moved * shape // self._sizes, 0, shape - 1)
        return np.ascontiguousarray(positions.T)


def widened(seen: TensorSeen, factor: float) -> TensorSeen:
    """With extremes further out: room for scans unlike those of the calibration."""
    return replace(seen, low=seen.low * factor, high=seen.high * factor)
