"""The judge of recipes: builds the engine of one and compares its labels with those of FP32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ptq3d.datasets.cases import Case, read_image, true_classes
from ptq3d.datasets.label_map import LabelMap
from ptq3d.engines.base import Engine, int8_mac_share
from ptq3d.errors import OptionError
from ptq3d.evaluation.certificate import certificate
from ptq3d.evaluation.metrics import dice_per_class, fidelity, fidelity_per_class, mean_dice
from ptq3d.graphs.files import static_input_shape
from ptq3d.graphs.layers import layers
from ptq3d.options import CaseOptions
from ptq3d.predict import predict_labels, prepared_case
from ptq3d.progress import bar
from ptq3d.quantization.budget import Sensitivity, Trial
from ptq3d.quantization.calibration import draw_windows, shares
from ptq3d.quantization.quantizer import Quantized, Recipe
from ptq3d.quantizing import Calibrated
from ptq3d.recipes import Engines
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.volume import Volume

log = logging.getLogger("ptq3d")
WINDOWS = 4  # of all validation cases together; whole cases are judged once, at the end
ROUNDS = 7  # timed windows of each of two engines in turn
Labels = np.ndarray


@dataclass(frozen=True)
class _Window:
    """One validation window with what FP32 answers, and the truth where it is known."""

    values: np.ndarray
    reference: Labels
    truth: Labels | None


class Judge:
    """Builds engines of recipes and compares their labels with those of the FP32 engine.

    Args:
        found: the calibrated FP32 graph.
        target: the runtime the graphs are written for; its own engine judges where ptq3d has it, else ONNX Runtime's.
        cases: to validate on.
        label_map: from the values of their label files to classes.
        scratch: a folder for engines.
    """

    def __init__(
        self, found: Calibrated, target: str, cases: Sequence[Case], label_map: LabelMap, scratch: Path
    ) -> None:
        self._found, self._cases, self._label_map = found, cases, label_map
        self.engines = Engines(found.model, found.seen, target, scratch)
        self._own = self.engines.name == target
        if not self._own:
            log.warning("a file for '%s' is judged in ONNX Runtime: its own engine is compiled for a GPU.", target)
        self._trials: dict[Recipe, Trial] = {}
        self.measured: tuple[Sensitivity, ...] = ()
        self._windows: tuple[_Window, ...] = ()

    @property
    def macs(self) -> dict[str, int]:
        """Multiplying layer -> its multiplications."""
        return {layer.name: layer.macs for layer in layers(self._found.model)}

    def made(self, recipe: Recipe) -> Quantized:
        """The graph of a recipe."""
        return self.engines.made(recipe)

    def __call__(self, recipe: Recipe) -> Trial:
        """What a recipe is worth on the validation windows; its engine is built the first time."""
        if recipe not in self._trials:
            self._trials[recipe] = self._trial(recipe)
        return self._trials[recipe]

    def _trial(self, recipe: Recipe) -> Trial:
        if not self._windows:
            self._windows = tuple(self._reference_windows())
        with self.engines.of(recipe) as engine:
            found = [engine(window.values)[0].argmax(0) for window in self._windows]
            share = int8_mac_share(engine.layers()) if self._own else self.made(recipe).int8_mac_share
        return Trial(self._disagreement(found), share)

    def _disagreement(self, found: Sequence[Labels]) -> float:
        classes = self._found.manifest.classes
        reference = np.stack([window.reference for window in self._windows])
        truths = [window.truth for window in self._windows if window.truth is not None]
        if len(truths) == len(found):
            truth = np.stack(truths)
            before = mean_dice(dice_per_class(reference, truth, classes))
            return before - mean_dice(dice_per_class(np.stack(found), truth, classes))
        kept = fidelity(np.stack(found), reference, classes)
        if np.isnan(kept):
            raise OptionError(
                "no class fills 1000 voxels of the validation windows in FP32, so they say nothing. Give other volumes."
            )
        return 1 - kept

    def _reference_windows(self) -> Iterator[_Window]:
        prepared, window = preprocessing_of_cases(self._found), self._found.manifest.window
        generator = np.random.default_rng(0)
        cases = self._cases[:WINDOWS]
        with self.engines.of(None) as engine:
            for case, number in zip(cases, shares(WINDOWS, len(cases)), strict=True):
                image = read_image(case)
                prepared_image = prepared.apply(image)
                ready = prepared_image.data
                truth = None
                classes = true_classes(case, image.grid, self._label_map)
                if classes is not None:
                    labels = Volume(classes[None], image.affine)
                    truth = prepared.apply_labels(labels, prepared_image.grid).data.astype(np.float32)
                stacked = ready if truth is None else np.concatenate([ready, truth])
                seen = (ready[0] > ready[0].mean()) if truth is None else truth[0] > 0
                for piece in draw_windows(stacked, window, number, foreground=seen, generator=generator):
                    values = np.ascontiguousarray(piece[None, : len(ready)])
                    true = None if truth is None else piece[-1].astype(np.int64)
                    yield _Window(values, engine(values)[0].argmax(0), true)

    def seconds_ratio(self, candidate: Recipe, current: Recipe) -> float:
        """Median time of a window with one recipe over that with another, measured in turn."""
        window = np.zeros((1, *static_input_shape(self._found.model)[1:]), np.float32)
        with (
            self.engines.of(candidate) as one,
            self.engines.of(current) as other,
        ):
            taken = [[_seconds(engine, window) for engine in (one, other)] for _ in range(ROUNDS + 1)][1:]
        return float(np.median([first / second for first, second in taken]))

    def certify(self, recipe: Recipe, *, quiet: bool) -> dict[str, Any]:
        """Whole validation cases, FP32 and INT8: fidelity per class, the worst case, Dice where labels are given."""
        manifest, prepared = self._found.manifest, preprocessing_of_cases(self._found)
        kept, dice = [], []
        with (
            self.engines.of(None) as exact,
            self.engines.of(recipe) as engine,
            bar("Verify", quiet=quiet) as progress,
        ):
            for done, case in enumerate(self._cases, 1):
                image = read_image(case)
                ready, plainly = prepared_case(image, prepared, CaseOptions()), CaseOptions()
                answers = [
                    predict_labels(ready, one, manifest, prepared, plainly).labels.data[0] for one in (exact, engine)
                ]
                kept.append(fidelity_per_class(answers[1], answers[0], manifest.classes))
                truth = true_classes(case, image.grid, self._label_map)
                if truth is not None:
                    dice.append([mean_dice(dice_per_class(answer, truth, manifest.classes)) for answer in answers])
                progress(done, len(self._cases))
            share = int8_mac_share(engine.layers())
        # a case where only one of them finds what is not there counts as right for the other (see `paired_means`)
        dice = [np.nan_to_num(pair, nan=1.0).tolist() for pair in dice if not np.isnan(pair).all()]
        evidence = certificate([case.name for case in self._cases], manifest.labels[1:], np.asarray(kept))
        evidence |= {
            "cases": {case.name: case.digest for case in self._cases},
            "engine": self.engines.name,
            "built_int8_mac_share": share,
        }
        if dice:
            evidence["mean_dice"] = dict(zip(("fp32", "int8"), np.mean(dice, 0).tolist(), strict=True))
        return {"validation": evidence}


def _seconds(engine: Engine, window: np.ndarray) -> float:
    start = perf_counter()
    engine(window)
    return perf_counter() - start


def preprocessing_of_cases(found: Calibrated) -> Preprocessing:
    """How volumes are prepared for the network.

    Raises:
        OptionError: nobody said so.
    """
    if found.manifest.preprocessing is None:
        raise OptionError("nothing says how to prepare the validation volumes. Give --preprocessing btcv | FILE.")
    return found.manifest.preprocessing
