"""Quantization that is judged on the engine that was built: within a budget of disagreement, not slower, with a certificate."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ptq3d.datasets.folders import Case, find_cases
from ptq3d.engines import BACKENDS, get_backend
from ptq3d.engines.base import Engine, EngineOptions, int8_mac_share
from ptq3d.errors import BudgetError, OptionError
from ptq3d.evaluation.certificate import certificate
from ptq3d.evaluation.metrics import dice_per_class, fidelity, fidelity_per_class, mean_dice
from ptq3d.graphs.files import save_graph
from ptq3d.graphs.layers import layers
from ptq3d.manifest import sha256, write_text
from ptq3d.options import QuantizeOptions, SensitivityOptions
from ptq3d.pipeline import Calibrated, Written, check_modelopt_flags, observed, recipe_of, write_quantized
from ptq3d.pipeline import quantize as quantize_plainly
from ptq3d.predict import predict_labels, true_classes, truth_map
from ptq3d.progress import bar
from ptq3d.quantization.budget import Search, Sensitivity, Trial, by_worth, guard, keeping, search
from ptq3d.quantization.calibration import draw_windows
from ptq3d.quantization.quantizer import Quantized, Recipe, quantize_graph
from ptq3d.volumes.files import load_image, load_labels
from ptq3d.volumes.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("ptq3d")
WINDOWS = 4  # of all validation cases together; whole cases are judged once, at the end
ROUNDS = 7  # timed windows of each of two engines in turn
Labels = np.ndarray


def quantize(options: QuantizeOptions) -> Written:
    """FP32 ONNX -> Q/DQ ONNX; with validation data also the evidence, with a budget the recipe that keeps it.

    Raises:
        BudgetError: no recipe keeps the budget; the message names the worst layers. Nothing is written but the report.
        OptionError: a budget or labels without validation data, calibration data among it.
        InputError: see `pipeline.quantize`.
    """
    check_modelopt_flags(options)
    _check_validation(options)
    if options.retarget is not None or (options.validation_data is None and not options.guard):
        return quantize_plainly(options)
    found = observed(options)
    recipe, evidence = recipe_of(options), dict[str, Any]()
    with _judge(options, found) as judge:
        if options.guard:
            recipe, evidence["guard"] = _guarded(judge, recipe, quiet=options.quiet)
        if options.budget is not None:
            recipe, evidence["search"] = _within(options, judge, recipe)
        made = judge.made(recipe)
        if options.validation_data is not None:
            evidence |= judge.certify(made, quiet=options.quiet)
            _require_budget(options, evidence)
    return write_quantized(options, found, recipe, made, evidence)


def sensitivity(options: SensitivityOptions) -> tuple[Sensitivity, ...]:
    """What INT8 in each layer alone does to the answer, the most sensitive first.

    Raises:
        OptionError: no validation data.
    """
    if options.validation_data is None:
        raise OptionError("--validation-data is missing: volumes on which the answers are compared.")
    _check_validation(options)
    found = observed(options)
    with _judge(options, found) as judge:
        measured = _sensitivities(judge, recipe_of(options), quiet=options.quiet)
    if options.figure is not None:
        _draw(options.figure, measured)
    return tuple(sorted(measured, key=lambda one: one.disagreement, reverse=True))


def _check_validation(options: QuantizeOptions) -> None:
    if options.validation_data is None and (options.budget is not None or options.validation_labels is not None):
        raise OptionError(
            "--budget and --validation-labels need --validation-data: volumes that were not calibrated on."
        )
    if options.budget is not None and not 0 < options.budget < 1:
        raise OptionError(f"--budget {options.budget}: a disagreement between 0 and 1 is wanted, e.g. 0.005.")


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
        target: the runtime the graphs are written for; its own engine judges where it is here, else ONNX Runtime's.
        cases: to validate on.
        scratch: a folder for engines.
    """

    def __init__(self, found: Calibrated, target: str, cases: Sequence[Case], scratch: Path) -> None:
        self._found, self._cases, self._scratch = found, cases, scratch
        self._backend = get_backend(target if target in BACKENDS else "onnxruntime")
        self._number = 0
        self._made: dict[Recipe, Quantized] = {}
        self._engines: dict[Recipe, Path] = {}
        self._windows: tuple[_Window, ...] = ()

    @property
    def macs(self) -> dict[str, int]:
        """Multiplying layer -> its multiplications."""
        return {layer.name: layer.macs for layer in layers(self._found.model)}

    def made(self, recipe: Recipe) -> Quantized:
        """The graph of a recipe."""
        if recipe not in self._made:
            self._made = {recipe: quantize_graph(self._found.model, self._found.seen, recipe)}
        return self._made[recipe]

    @contextmanager
    def _engine(self, model: ir.Model) -> Iterator[Engine]:
        self._number += 1
        folder = self._scratch / f"engine-{self._number}"
        folder.mkdir()
        save_graph(model, folder / "network.onnx")
        self._backend.build(folder / "network.onnx", folder)
        with self._backend.open(folder, EngineOptions()) as engine:
            yield engine

    def __call__(self, recipe: Recipe) -> Trial:
        """What a recipe is worth on the validation windows, its engine built."""
        if not self._windows:
            self._windows = tuple(self._reference_windows())
        with self._engine(self.made(recipe).model) as engine:
            found = [engine(window.values)[0].argmax(0) for window in self._windows]
            share = int8_mac_share(engine.layers())
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
        prepared, window = _preprocessing(self._found), self._found.manifest.window
        generator = np.random.default_rng(0)
        label_map = truth_map(None, self._found.manifest)
        with self._engine(self._found.model.clone()) as engine:
            for case, number in _spread(self._cases, WINDOWS):
                image = load_image(case.image)
                ready = prepared.apply(image).data
                truth = None
                if case.label is not None:
                    true_classes(case, image, label_map)
                    truth = prepared.apply_labels(load_labels(case.label)).data.astype(np.float32)
                stacked = ready if truth is None else np.concatenate([ready, truth])
                seen = (ready[0] > ready[0].mean()) if truth is None else truth[0] > 0
                for piece in draw_windows(stacked, window, number, foreground=seen, generator=generator):
                    values = np.ascontiguousarray(piece[None, : len(ready)])
                    labels = None if truth is None else piece[-1].astype(np.int64)
                    yield _Window(values, engine(values)[0].argmax(0), labels)

    def seconds_ratio(self, candidate: Recipe, current: Recipe) -> float:
        """Median time of a window with one recipe over that with another, measured in turn."""
        shape = (1, *(int(size) for size in self._input_shape()))
        window = np.zeros(shape, np.float32)
        with (
            self._engine(self.made(candidate).model) as one,
            self._engine(self.made(current).model) as other,
        ):
            taken = [[_seconds(engine, window) for engine in (one, other)] for _ in range(ROUNDS + 1)][1:]
        return float(np.median([first / second for first, second in taken]))

    def _input_shape(self) -> tuple[int, ...]:
        shape = self._found.model.graph.inputs[0].shape
        return tuple(size if isinstance(size, int) else 1 for size in shape)[1:] if shape is not None else ()

    def certify(self, made: Quantized, *, quiet: bool) -> dict[str, Any]:
        """Whole validation cases, FP32 and INT8: fidelity per class, the worst case, Dice where labels are given."""
        manifest, prepared = self._found.manifest, _preprocessing(self._found)
        label_map = truth_map(None, manifest)
        kept, dice = [], []
        with (
            self._engine(self._found.model.clone()) as exact,
            self._engine(made.model) as engine,
            bar("Verify", quiet=quiet) as progress,
        ):
            for done, case in enumerate(self._cases, 1):
                image = load_image(case.image)
                answers = [predict_labels(image, one, manifest, prepared)[0].data[0] for one in (exact, engine)]
                kept.append(fidelity_per_class(answers[1], answers[0], manifest.classes))
                truth = true_classes(case, image, label_map)
                if truth is not None:
                    dice.append([mean_dice(dice_per_class(answer, truth, manifest.classes)) for answer in answers])
                progress(done, len(self._cases))
            share = int8_mac_share(engine.layers())
        evidence = certificate([case.name for case in self._cases], manifest.labels[1:], np.asarray(kept))
        evidence |= {"cases": {case.name: sha256(case.image) for case in self._cases}, "built_int8_mac_share": share}
        if dice:
            evidence["mean_dice"] = dict(zip(("fp32", "int8"), np.mean(dice, 0).tolist(), strict=True))
        return {"validation": evidence}


def _seconds(engine: Engine, window: np.ndarray) -> float:
    start = perf_counter()
    engine(window)
    return perf_counter() - start


def _preprocessing(found: Calibrated) -> Preprocessing:
    if found.manifest.preprocessing is None:
        raise OptionError("nothing says how to prepare the validation volumes. Give --preprocessing btcv | FILE.")
    return found.manifest.preprocessing


def _spread(cases: Sequence[Case], number: int) -> Iterator[tuple[Case, int]]:
    """Cases, each with its number of windows: one each where there are more than windows."""
    used = cases[:number]
    for index, case in enumerate(used):
        yield case, (number * (index + 1)) // len(used) - (number * index) // len(used)


@contextmanager
def _judge(options: QuantizeOptions, found: Calibrated) -> Iterator[Judge]:
    cases: list[Case] = []
    if options.validation_data is not None:
        cases = find_cases(
            options.validation_data, options.validation_labels, required_labels=options.validation_labels is not None
        )
        used = set(found.cases.values())
        shared = [case.name for case in cases if sha256(case.image) in used]
        if shared:
            raise OptionError(
                f"the validation case {shared[0]} was calibrated on, so it proves nothing. Give other volumes to --validation-data."
            )
    with tempfile.TemporaryDirectory() as scratch:
        yield Judge(found, options.target, cases, Path(scratch))


def _guarded(judge: Judge, recipe: Recipe, *, quiet: bool) -> tuple[Recipe, dict[str, Any]]:
    macs, whole = judge.macs, sum(judge.macs.values())
    thin = {name: macs[name] for name in judge.made(recipe).plan.layers if macs[name] < 0.05 * whole}
    with bar("Guard", quiet=quiet) as progress:
        faster = _counting(judge.seconds_ratio, progress, len(thin))
        recipe, ratios = guard(recipe, thin, faster)
    return recipe, {"seconds_ratio_in_floating_point": ratios}


def _counting(call: Callable[..., Any], progress: Callable[[int, int], None], total: int) -> Callable[..., Any]:
    done = 0

    def counted(*arguments: object) -> Any:
        nonlocal done
        result = call(*arguments)
        done += 1
        progress(min(done, total), total)
        return result

    return counted


def _sensitivities(judge: Judge, recipe: Recipe, *, quiet: bool) -> tuple[Sensitivity, ...]:
    macs = judge.macs
    names = judge.made(replace(recipe, second_terms=0.0)).plan.layers
    with bar("Sensitivity", quiet=quiet) as progress:
        trial = _counting(judge, progress, len(names))
        found = []
        for name in names:
            alone = keeping(replace(recipe, second_terms=0.0), [other for other in names if other != name])
            found.append(Sensitivity(name, macs[name], trial(alone).disagreement))
    return tuple(found)


def _within(options: QuantizeOptions, judge: Judge, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that keeps the budget on the validation windows, with the report of the search."""
    budget = options.budget or 0.0
    plain = judge(recipe)
    measured = () if plain.disagreement <= budget else _sensitivities(judge, recipe, quiet=options.quiet)
    order = by_worth(measured)
    with bar("Search", quiet=options.quiet) as progress:
        result = search(recipe, order, _counting(judge, progress, len(order).bit_length() + 3), budget)
    report = _search_report(result, measured, budget)
    path = _beside(options, "sensitivity.json")
    write_text(path, json.dumps(report, indent=1) + "\n")
    log.info("%s: layer sensitivities and every step of the search", path)
    if not result.met:
        best = min(step.trial.disagreement for step in result.steps)
        raise BudgetError(_sorry(budget, best, measured))
    return result.recipe, report


def _search_report(result: Search, measured: Sequence[Sensitivity], budget: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "met_on_windows": result.met,
        "sensitivity": [vars(one) for one in measured],
        "steps": [step.to_dict() for step in result.steps],
        "keep": list(result.recipe.keep),
    }


def _beside(options: QuantizeOptions, name: str) -> Path:
    output = options.output_path or options.onnx_path.with_name(f"{options.onnx_path.stem}_int8.onnx")
    return output.with_name(f"{output.stem}.{name}")


def _sorry(budget: float, best: float, measured: Sequence[Sensitivity]) -> str:
    worst = sorted(measured, key=lambda one: one.disagreement, reverse=True)[:3]
    names = ", ".join(f"{one.layer} ({one.disagreement:.4f} alone)" for one in worst)
    return (
        f"no recipe keeps the budget of {budget}: the best disagrees by {best:.4f}. The worst layers are {names or 'unknown'}. "
        "Calibrate on more and more varied volumes, or allow a larger --budget."
    )


def _require_budget(options: QuantizeOptions, evidence: dict[str, Any]) -> None:
    """The whole cases must keep it too, on the engine that was built."""
    found = evidence["validation"]
    if options.budget is None or found["fidelity"] is None:
        return
    lost = 1 - found["fidelity"]["mean"]
    if "mean_dice" in found:
        lost = found["mean_dice"]["fp32"] - found["mean_dice"]["int8"]
    if lost > options.budget:
        measured = [Sensitivity(**one) for one in evidence["search"]["sensitivity"]]
        raise BudgetError(_sorry(options.budget, lost, measured))


def _draw(path: Path, measured: Sequence[Sensitivity]) -> None:
    from ptq3d.evaluation.figures import draw_sensitivity

    draw_sensitivity(path, [(one.layer, one.disagreement, one.macs) for one in measured])
