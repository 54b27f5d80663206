"""How far the labels of one engine follow those of another, over cases: per class, with intervals, the worst case named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.evaluation.metrics import mean_dice
from ptq3d.evaluation.statistics import paired_bootstrap


def certificate(cases: Sequence[str], classes: Sequence[str], kept: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The evidence that label maps did not change, JSON-able.

    Args:
        cases: names.
        classes: names of the foreground classes.
        kept: (cases, K - 1) from `fidelity_per_class`, NaN where a class is too small to say anything.

    Returns:
        fidelity and its interval over cases, the same per class, and the worst case; None where nothing can be said.
    """
    means = [mean_dice(case) for case in kept]
    known = [index for index, mean in enumerate(means) if not np.isnan(mean)]
    if not known:
        return {"fidelity": None, "cases": list(cases), "fidelity_per_class": {}, "worst_case": None}
    worst = min(known, key=lambda index: means[index])
    return {
        "fidelity": _interval([means[index] for index in known]),
        "cases": list(cases),
        "fidelity_per_class": {
            name: _interval(kept[~np.isnan(kept[:, place]), place].tolist())
            for place, name in enumerate(classes)
            if not np.isnan(kept[:, place]).all()
        },
        "worst_case": {"case": cases[worst], "fidelity": means[worst]},
    }


def _interval(values: Sequence[float]) -> dict[str, float | int]:
    """Mean over cases with its bootstrap interval."""
    found = paired_bootstrap(np.zeros(len(values)), values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "confidence": 0.95, "n": len(values)}
