"""What `ptq3d compare` found of engines, as a report and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq3d.evaluation.certificate import certificate
from ptq3d.evaluation.scores import Score, case_means, summarize, summarize_all
from ptq3d.evaluation.statistics import Interval, LatencySummary, NonInferiority


@dataclass(frozen=True)
class Row:
    """What was measured of one engine; see `to_dict` for the units.

    Args:
        name: as given on the command line.
        engine: the runtime.
        precision: "int8" where any layer runs so, "unknown" where the runtime does not tell, otherwise the floating-point type.
        size_bytes: of the artefact's files.
        latency: of one window, in ms.
        case_seconds: whole case, reading to writing, one a case.
        peak_memory_bytes: of the process that segmented the cases, libraries included.
        int8_mac_share: as the runtime reports it.
        layers: every multiplying layer with what the runtime says of it: name, op, precision, macs.
        scores: a row for each case and foreground class; empty without labels.
        fidelity: one a case; NaN where no class is large enough to say anything.
        kept: (cases, K - 1) fidelity of each class, NaN where it is too small.
        dice_change: mean Dice minus the first engine's, over cases; None for the first.
        non_inferiority: of mean Dice against the first engine; None where no margin is given.
    """

    name: str
    engine: str
    precision: str
    size_bytes: int
    latency: LatencySummary
    case_seconds: tuple[float, ...]
    peak_memory_bytes: int
    int8_mac_share: float
    layers: tuple[Mapping[str, Any], ...]
    scores: tuple[Score, ...]
    fidelity: tuple[float, ...]
    kept: np.ndarray
    dice_change: Interval | None
    non_inferiority: NonInferiority | None

    @property
    def mean_dice(self) -> float | None:
        """Mean over cases of the mean over classes; None without labels, or with no class in any of them."""
        means = [mean for mean in case_means(self.scores).values() if not np.isnan(mean)]
        return float(np.mean(means)) if means else None

    @property
    def known_fidelity(self) -> list[float]:
        """Fidelity of the cases that say something of it."""
        return [value for value in self.fidelity if not np.isnan(value)]

    @property
    def mean_fidelity(self) -> float | None:
        """Mean over the cases that say something; None where none does."""
        return float(np.mean(self.known_fidelity)) if self.known_fidelity else None

    def to_dict(self, classes: Sequence[str], cases: Sequence[str]) -> dict[str, Any]:
        """JSON-able, one key a figure; `classes` are the foreground classes, `cases` the cases."""
        change, found = self.dice_change, self.non_inferiority
        per_class = [one.to_dict() for one in summarize(self.scores)]
        return {
            "name": self.name,
            "engine": self.engine,
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "window_latency_ms": {
                "median": self.latency.median,
                "p5": self.latency.p5,
                "p95": self.latency.p95,
                "n": self.latency.n,
                "batch": 1,
            },
            "case_seconds": float(np.median(self.case_seconds)),
            "case_seconds_each": list(self.case_seconds),
            "peak_memory_bytes": self.peak_memory_bytes,
            "mean_dice": self.mean_dice,
            "dice_change": None
            if change is None
            else {"mean": change.mean, "low": change.low, "high": change.high, "confidence": 0.95},
            "dice_per_class": {one["label"]: one["dice"] and one["dice"]["mean"] for one in per_class},
            "all_classes": summarize_all(self.scores).to_dict() if self.scores else None,
            "classes": per_class,
            "non_inferiority": None if found is None else found.to_dict(),
            "fidelity": self.mean_fidelity,
            "fidelity_worst_case": min(self.known_fidelity, default=None),
            "int8_mac_share": self.int8_mac_share,
            "layers": [dict(layer) for layer in self.layers],
            "certificate": certificate(cases, classes, self.kept),
        }


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, the first engine first.

    Args:
        rows: one an engine.
        classes: foreground class names.
        cases: names of the cases.
        window: (X, Y, Z) of the first engine.
        notes: how it was measured.
    """

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    cases: tuple[str, ...]
    window: tuple[int, int, int]
    notes: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "rows": [row.to_dict(self.classes, self.cases) for row in self.rows],
            "cases": list(self.cases),
            "window": list(self.window),
            "sentences": list(self.sentences()),
            **self.notes,
        }

    def sentences(self) -> Iterator[str]:
        """What surfaces and a margin have to say of each engine."""
        for row in self.rows:
            whole = summarize_all(row.scores)
            if whole.surface_dice and whole.hd95_mm:
                yield (
                    f"{row.name}: surface Dice {whole.surface_dice.mean:.4f} within {self.notes['tolerance_mm']:g} mm, "
                    f"HD95 {whole.hd95_mm.median:.2f} mm (median), {whole.one_sided} times a class in one map only."
                )
            if row.non_inferiority is not None:
                yield row.non_inferiority.statement(self.rows[0].name, row.name)
