"""The one picture that stands for a comparison: size, latency, and a slice with truth, both answers and where they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.errors import UnavailableError

Labels = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, eq=False)
class Slice:
    """One axial slice, turned so that anterior is up and the patient's right is on the left.

    Args:
        image: (rows, columns) float32, HU.
        labels: title -> (rows, columns) classes; drawn in this order.
        spacing: (row, column) in mm.
        window: (low, high) of the grey scale, HU.
    """

    image: npt.NDArray[np.float32]
    labels: dict[str, Labels]
    spacing: tuple[float, float]
    window: tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """One engine's bars: its label, megabytes, and milliseconds a window (median, p5, p95)."""

    label: str
    megabytes: float
    median_ms: float
    low_ms: float
    high_ms: float


def draw_report(path: Path, bars: Sequence[Bar], shown: Slice, *, title: str) -> None:
    """Write the picture as PNG.

    Args:
        path: where to; written beside its place and renamed.
        bars: FP32 first.
        shown: its last two label maps are the ones whose difference is drawn.
        title: one line.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure = plt.figure(figsize=(15, 5.6), dpi=110, layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    _bars(top.subplots(1, 2), bars)
    _slices(bottom.subplots(1, len(shown.labels) + 2), shown)
    _save(plt, figure, path)


def draw_sensitivity(path: Path, layers: Sequence[tuple[str, float, int]]) -> None:
    """Write a bar for each layer as PNG, in the order of the graph.

    Args:
        path: where to; written beside its place and renamed.
        layers: (name, disagreement with only this layer in INT8, multiply-accumulates).

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    plt = _pyplot()
    whole = max(sum(macs for _, _, macs in layers), 1)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.28 * len(layers)), dpi=110, sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    names = [name for name, _, _ in layers]
    left.barh(names, [value for _, value, _ in layers], color="#e76f51")
    left.set_title("disagreement with FP32, this layer alone in INT8", fontsize=10)
    right.barh(names, [macs / whole for _, _, macs in layers], color="#6b7a8f")
    right.set_title("share of multiplications", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    _save(plt, figure, path)


def require_matplotlib() -> None:
    """Say early that no picture can be drawn.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UnavailableError(f"{error}; mend it with: pip install 'ptq3d[demo]'") from error
    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def _bars(axes: Any, bars: Sequence[Bar]) -> None:
    colours = ["#6b7a8f", "#2a9d8f", "#e9c46a", "#e76f51"]
    names = [bar.label for bar in bars]
    sizes, medians = [bar.megabytes for bar in bars], [bar.median_ms for bar in bars]
    for axis, values, ends, unit in (
        (axes[0], sizes, sizes, "engine size, MB"),
        (axes[1], medians, [bar.high_ms for bar in bars], "one window, ms (median, p5-p95)"),
    ):
        axis.barh(names, values, color=colours[: len(bars)])
        for name, value, end in zip(names, values, ends, strict=True):
            text = f"{value:.4g}   {values[0] / value:.2f} x"
            axis.annotate(text, (end, name), xytext=(8, 0), textcoords="offset points", va="center")
        axis.set_xlim(0, max(ends) * 1.3)
        axis.invert_yaxis()
        axis.set_title(unit, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    errors = [[bar.median_ms - bar.low_ms for bar in bars], [bar.high_ms - bar.median_ms for bar in bars]]
    axes[1].errorbar(medians, names, xerr=errors, fmt="none", ecolor="black", capsize=3)


def _slices(axes: Any, shown: Slice) -> None:
    aspect = shown.spacing[0] / shown.spacing[1]
    grey: dict[str, Any] = {
        "cmap": "gray",
        "vmin": shown.window[0],
        "vmax": shown.window[1],
        "aspect": aspect,
        "interpolation": "nearest",
    }
    for axis in axes:
        axis.imshow(shown.image, **grey)
        axis.set_axis_off()
    axes[0].set_title("CT", fontsize=10)
    for axis, (name, labels) in zip(axes[1:], shown.labels.items(), strict=False):
        masked = np.ma.masked_equal(labels, 0)
        axis.imshow(masked, cmap="tab20", vmin=1, vmax=20, alpha=0.65, aspect=aspect, interpolation="nearest")
        axis.set_title(name, fontsize=10)
    first, second = list(shown.labels.values())[-2:]
    differs = first != second
    axes[-1].imshow(np.ma.masked_equal(differs, False), cmap="autumn", aspect=aspect, interpolation="nearest")
    axes[-1].set_title(f"difference: {int(differs.sum())} of {int((first > 0).sum())} voxels", fontsize=10)
