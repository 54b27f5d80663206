"""Quantization that is judged on the engine that was built: within a budget of disagreement, not slower, with a certificate."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq3d.data import find_data, judged_by, with_labels, without_labels
from ptq3d.datasets.cases import Case
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.label_map import LabelMap
from ptq3d.engines import BACKENDS
from ptq3d.errors import BudgetError, OptionError
from ptq3d.evaluation.figures import draw_sensitivity, require_matplotlib
from ptq3d.judging import Judge, preprocessing_of_cases
from ptq3d.manifest import write_text
from ptq3d.options import QuantizeOptions, SensitivityOptions
from ptq3d.pipeline import Written
from ptq3d.progress import bar
from ptq3d.quantization.budget import TERMS, Search, Sensitivity, by_worth, guard, keeping, kept_since, search
from ptq3d.quantization.quantizer import Quantized, Recipe
from ptq3d.quantizing import (
    Calibrated,
    check_modelopt_flags,
    observed,
    output_of,
    recipe_of,
    settled,
    with_onnx,
    write_quantized,
)
from ptq3d.quantizing import quantize as quantize_plainly

log = logging.getLogger("ptq3d")
ATTEMPTS = 3  # searches, each with less to spend on windows, until whole cases keep the budget


def quantize(options: QuantizeOptions) -> Written:
    """FP32 ONNX -> Q/DQ ONNX; with validation data also the evidence, with a budget the recipe that keeps it.

    Raises:
        BudgetError: no recipe that was tried keeps the budget; the message names the worst layers. Nothing is written but
            `<output>.sensitivity.json`.
        OptionError: a budget or labels without validation data, calibration data among it.
        InputError: see `quantizing.quantize`.
    """
    check_modelopt_flags(options)
    _check_validation(options)
    options = with_onnx(options)
    if options.retarget is not None or (options.validation_data is None and not options.guard):
        return quantize_plainly(options)
    data = _validation(options)
    found = observed(options)
    why = dict[str, str]()
    with _judge(options, found, data) as judge:
        start, evidence = settled(options, found, judge.engines)
        recipe = start
        if options.guard:
            recipe, evidence["guard"] = _guarded(judge, recipe, quiet=options.quiet)
            why |= dict.fromkeys(kept_since(start, recipe, judge.macs), "slower in INT8, says --guard")
        if options.validation_data is None:
            made = judge.made(recipe)
        else:
            guarded = recipe
            recipe, made, more = _judged(options, judge, recipe)
            evidence |= more
            why |= dict.fromkeys(kept_since(guarded, recipe, judge.macs), "too sensitive for the budget")
    made = replace(made, kept={name: why.get(name, reason) for name, reason in made.kept.items()})
    return write_quantized(options, found, recipe, made, evidence)


def _judged(options: QuantizeOptions, judge: Judge, start: Recipe) -> tuple[Recipe, Quantized, dict[str, Any]]:
    """The recipe that keeps the budget on whole cases; windows guide the search, with less to spend where they flatter."""
    target, recipe = options.budget, start
    for _ in range(ATTEMPTS):
        evidence = dict[str, Any]()
        if target is not None:
            recipe, evidence["search"] = _within(options, judge, start, target)
        made = judge.made(recipe)
        evidence |= judge.certify(recipe, quiet=options.quiet)
        lost = _lost(evidence["validation"])
        if options.budget is None or target is None or lost <= options.budget:
            return recipe, made, evidence
        log.info("whole cases disagree by %.4f with this recipe; searching again with less to spend", lost)
        target *= 0.8 * options.budget / lost
    raise BudgetError(_sorry(options.budget or 0.0, lost, judge.measured))


def sensitivity(options: SensitivityOptions) -> tuple[Sensitivity, ...]:
    """What INT8 in each layer alone does to the answer, the most sensitive first.

    Raises:
        OptionError: no validation data.
    """
    if options.validation_data is None:
        raise OptionError("--validation-data is missing: volumes on which the answers are compared.")
    _check_validation(options)
    if options.figure is not None:
        require_matplotlib()
    options = with_onnx(options)
    data = _validation(options)
    found = observed(options)
    with _judge(options, found, data) as judge:
        measured = _sensitivities(judge, recipe_of(options), quiet=options.quiet)
    if options.figure is not None:
        _draw(options.figure, measured)
    return tuple(sorted(measured, key=lambda one: one.disagreement, reverse=True))


def _check_validation(options: QuantizeOptions) -> None:
    if options.validation_data is None and (options.budget is not None or options.validation_labels is not None):
        raise OptionError(
            "--budget and --validation-labels need --validation-data: volumes that were not calibrated on."
        )
    if options.retarget is not None and (options.guard or options.validation_data is not None):
        raise OptionError(
            "--retarget keeps the file's own scales and measures nothing: leave out --guard, --budget and --validation-data, "
            "or quantize the FP32 file."
        )
    if options.guard and options.target not in BACKENDS:
        raise OptionError(f"--guard times the engine of the target, and ptq3d runs none for '{options.target}' here.")
    if options.budget is not None and not 0 < options.budget < 1:
        raise OptionError(f"--budget {options.budget}: a disagreement between 0 and 1 is wanted, e.g. 0.005.")


def _validation(options: QuantizeOptions) -> Dataset | None:
    """The validation data; without labels unless they are named, since they decide what a budget means."""
    if options.validation_data is None:
        return None
    found = find_data(options.validation_data, options.validation_labels, usual=("val", "test"))
    labels = options.validation_labels
    return without_labels(found) if labels is None else with_labels(found, labels)


@contextmanager
def _judge(options: QuantizeOptions, found: Calibrated, data: Dataset | None) -> Iterator[Judge]:
    cases, label_map = list[Case](), LabelMap.identity(found.manifest.labels)
    if data is not None:
        _require_unseen(found, data)
        cases, label_map = judged_by(
            data, found.manifest, labels=options.validation_labels, label_map=options.label_map
        )
    with tempfile.TemporaryDirectory() as scratch:
        yield Judge(found, options.target, cases, label_map, Path(scratch))


def _require_unseen(found: Calibrated, data: Dataset) -> None:
    """Refuse validation cases that were calibrated on, and data that nobody knows how to prepare."""
    _ = preprocessing_of_cases(found)
    used = set(found.cases.values())
    if not used:
        log.warning(
            "the calibration file does not say its cases: nobody checked that the validation volumes are others."
        )
    shared = [case.name for case in data.cases if case.digest in used]
    if shared:
        raise OptionError(
            f"the validation case {shared[0]} was calibrated on, so it proves nothing. Give other volumes to --validation-data."
        )


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


def _within(options: QuantizeOptions, judge: Judge, recipe: Recipe, budget: float) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that keeps the budget on the validation windows, with what to say of the search."""
    if not judge.measured and judge(recipe).disagreement > budget:
        judge.measured = _sensitivities(judge, recipe, quiet=options.quiet)
    order = by_worth(judge.measured)
    with bar("Search", quiet=options.quiet) as progress:
        trial = _counting(judge, progress, len(order).bit_length() + 3)
        result = search(recipe, order, trial, budget, terms=() if options.second_terms == 0 else TERMS)
    output = output_of(options)
    path = output.with_name(f"{output.stem}.sensitivity.json")
    write_text(path, json.dumps(_search_report(result, judge.measured, budget), indent=1) + "\n")
    log.info("%s: layer sensitivities and every step of the search", path)
    if not result.met:
        best = min(step.trial.disagreement for step in result.steps)
        raise BudgetError(_sorry(budget, best, judge.measured))
    return result.recipe, {"budget": options.budget, "windows_budget": budget, "engines_built": len(result.steps)}


def _search_report(result: Search, measured: Sequence[Sensitivity], budget: float) -> dict[str, Any]:
    return {
        "budget": budget,
        "met_on_windows": result.met,
        "sensitivity": [vars(one) for one in measured],
        "steps": [step.to_dict() for step in result.steps],
        "keep": list(result.recipe.keep),
    }


def _sorry(budget: float, best: float, measured: Sequence[Sensitivity]) -> str:
    worst = sorted(measured, key=lambda one: one.disagreement, reverse=True)[:3]
    names = ", ".join(f"{one.layer} ({one.disagreement:.4f} alone)" for one in worst)
    return (
        f"no recipe that was tried keeps the budget of {budget:.5g}: the best disagrees by {best:.4f}. "
        f"The worst layers are {names or 'unknown'}. "
        "Calibrate on more and more varied volumes, or allow a larger --budget."
    )


def _lost(found: dict[str, Any]) -> float:
    """The loss of mean Dice where labels were given, else 1 - fidelity.

    Raises:
        OptionError: the validation cases say neither.
    """
    if "mean_dice" in found:
        return float(found["mean_dice"]["fp32"] - found["mean_dice"]["int8"])
    if found["fidelity"] is None:
        raise OptionError(
            "no class fills 1000 voxels of a validation case in FP32, so the cases say nothing. Give others to --validation-data."
        )
    return float(1 - found["fidelity"]["mean"])


def _draw(path: Path, measured: Sequence[Sensitivity]) -> None:
    draw_sensitivity(path, [(one.layer, one.disagreement, one.macs) for one in measured])
