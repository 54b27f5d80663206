"""Engines side by side: size, window latency in turn, whole cases in a process each, Dice, fidelity to the first."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

import numpy as np

from ptq3d.artefacts import artefact_size
from ptq3d.datasets.cases import Case, read_image, true_classes
from ptq3d.datasets.folders import find_cases
from ptq3d.deployment import (
    CaseResult,
    Deployment,
    deploy_cases,
    prepare,
    truth_map,
    warn_of_calibration_cases,
)
from ptq3d.engines.base import Engine, EngineOptions, Precision, int8_mac_share
from ptq3d.errors import EngineError, OptionError
from ptq3d.evaluation.certificate import certificate
from ptq3d.evaluation.metrics import dice_per_class, fidelity_per_class, mean_dice
from ptq3d.evaluation.statistics import Interval, LatencySummary, paired_bootstrap
from ptq3d.memory import peak_memory_bytes
from ptq3d.options import CompareOptions
from ptq3d.progress import bar
from ptq3d.volumes.files import load_labels

WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """What was measured of one engine; see `to_dict` for the units.

    Args:
        name: as given on the command line.
        engine: the runtime.
        precision: "int8" where any layer runs so, otherwise the floating-point type.
        size_bytes: of the artefact's files.
        latency: of one window, in ms.
        case_seconds: whole case, reading to writing, one a case.
        peak_memory_bytes: of the process that segmented the cases, libraries included.
        int8_mac_share: as the runtime reports it.
        dice: (cases, K - 1), NaN where a class is in neither; empty without labels.
        fidelity: one a case.
        kept: (cases, K - 1) fidelity of each class, NaN where it is too small.
        dice_change: mean Dice minus the first engine's, over cases.
    """

    name: str
    engine: str
    precision: str
    size_bytes: int
    latency: LatencySummary
    case_seconds: tuple[float, ...]
    peak_memory_bytes: int
    int8_mac_share: float
    dice: np.ndarray
    fidelity: tuple[float, ...]
    kept: np.ndarray
    dice_change: Interval | None

    @property
    def mean_dice(self) -> float | None:
        """Mean over cases of the mean over classes; None without labels."""
        return float(np.mean([mean_dice(case) for case in self.dice])) if self.dice.size else None

    def to_dict(self, names: Sequence[str], cases: Sequence[str]) -> dict[str, Any]:
        """JSON-able, one key a figure; `names` are the foreground classes, `cases` the cases."""
        change = self.dice_change
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
            "dice_per_class": _per_class(self.dice, names),
            "fidelity": float(np.mean(self.fidelity)),
            "fidelity_worst_case": float(np.min(self.fidelity)),
            "int8_mac_share": self.int8_mac_share,
            "certificate": certificate(cases, names, self.kept),
        }


def _per_class(dice: np.ndarray, names: Sequence[str]) -> dict[str, float | None]:
    if not dice.size:
        return {}
    present = ~np.isnan(dice)
    return {name: float(dice[present[:, i], i].mean()) if present[:, i].any() else None for i, name in enumerate(names)}


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
            **self.notes,
        }


def compare(options: CompareOptions) -> Comparison:
    """Measure engines or ONNX files side by side, FP32 first.

    Raises:
        OptionError: no model, one named twice, or models of different classes.
        InputError: of the tree in `ptq3d.errors`, before the first measurement.
    """
    deployments = [_deployment(text, options) for text in _distinct(options.models)]
    manifest = deployments[0].manifest
    _require_same_classes(options.models, deployments)
    cases = find_cases(options.data, options.labels, required_labels=options.labels is not None)
    label_map = truth_map(options.label_map, manifest)
    for deployment in deployments:
        warn_of_calibration_cases(deployment.manifest, cases)
    truths = [true_classes(case, read_image(case), label_map) for case in cases]
    with tempfile.TemporaryDirectory() as scratch:
        timed = _time_windows(deployments, cases[0], options)
        outputs = [(options.output or Path(scratch)) / _folder_name(text) for text in options.models]
        runs = _segment_all(deployments, cases, outputs, quiet=options.quiet)
        judged = [_judge(cases, output, outputs[0], truths, manifest.classes) for output in outputs]
    rows = tuple(
        _row(text, deployment, latency, run, verdict, judged[0].dice)
        for text, deployment, latency, run, verdict in zip(
            options.models, deployments, timed, runs, judged, strict=True
        )
    )
    notes = {"repetitions": options.repetitions, "threads": options.threads, "machine": machine()}
    return Comparison(rows, label_map.names[1:], tuple(case.name for case in cases), manifest.window, notes)


@dataclass(frozen=True)
class _Timed:
    latency: LatencySummary
    int8_mac_share: float


@dataclass(frozen=True)
class _Run:
    results: tuple[CaseResult, ...]
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Verdict:
    """Dice (cases, K - 1), empty without labels; fidelity of each case, and of each class (cases, K - 1)."""

    dice: np.ndarray
    kept: np.ndarray

    @property
    def fidelity(self) -> tuple[float, ...]:
        return tuple(mean_dice(case) for case in self.kept)


def _row(name: str, deployment: Deployment, timed: _Timed, run: _Run, verdict: _Verdict, first: np.ndarray) -> Row:
    changed = verdict.dice is not first and verdict.dice.size > 0
    return Row(
        name=name,
        engine=deployment.manifest.engine["name"],
        precision="int8" if timed.int8_mac_share else deployment.options.precision,
        size_bytes=artefact_size(deployment.folder, deployment.manifest),
        latency=timed.latency,
        case_seconds=tuple(result.seconds["total"] for result in run.results),
        peak_memory_bytes=run.peak_memory_bytes,
        int8_mac_share=timed.int8_mac_share,
        dice=verdict.dice,
        fidelity=verdict.fidelity,
        kept=verdict.kept,
        dice_change=_change(first, verdict.dice) if changed else None,
    )


def _distinct(models: Sequence[str]) -> Sequence[str]:
    if not models:
        raise OptionError("name the models to compare, FP32 first: ptq3d compare fp32.onnx int8.onnx --data DIR.")
    if len(set(models)) != len(models):
        raise OptionError(f"a model is named twice in: {' '.join(models)}.")
    return models


def _deployment(text: str, options: CompareOptions) -> Deployment:
    """PATH, PATH@ENGINE or PATH@ENGINE:PRECISION as an engine with its manifest."""
    path, _, runtime = text.rpartition("@") if "@" in text else (text, "", "auto")
    engine, _, precision = runtime.partition(":")
    if precision and precision not in get_args(Precision):
        raise OptionError(f"'{text}': no precision '{precision}'. Write PATH@ENGINE:fp32, :bf16 or :fp16.")
    engine_options = EngineOptions("auto", cast(Precision, precision or "fp32"), options.threads)
    return prepare(
        Path(path), engine or "auto", engine_options, preprocessing=options.preprocessing, overlap=options.overlap
    )


def _require_same_classes(models: Sequence[str], deployments: Sequence[Deployment]) -> None:
    for text, deployment in zip(models, deployments, strict=True):
        if deployment.manifest.classes != deployments[0].manifest.classes:
            raise OptionError(
                f"{text} has {deployment.manifest.classes} classes, {models[0]} has {deployments[0].manifest.classes}. "
                "Compare engines of one network."
            )


def _folder_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text.split("/")[-1])


def _time_windows(deployments: Sequence[Deployment], case: Case, options: CompareOptions) -> list[_Timed]:
    """Latency of one real window, all engines in turn, and the INT8 share of each as its runtime reports it."""
    image = read_image(case)
    times: list[list[float]] = [[] for _ in deployments]
    rounds = WARM_UP + options.repetitions
    with ExitStack() as stack:
        engines = [stack.enter_context(deployment.open()) for deployment in deployments]
        windows = [_central_window(*pair, image) for pair in zip(deployments, engines, strict=True)]
        progress = stack.enter_context(bar("Time one window", quiet=options.quiet))
        for done in range(rounds):
            for engine, window, taken in zip(engines, windows, times, strict=True):
                start = perf_counter()
                engine(window)
                taken.append((perf_counter() - start) * 1e3)
            progress(done + 1, rounds)
        shares = [int8_mac_share(engine.layers()) for engine in engines]
    return [_Timed(LatencySummary.of(taken[WARM_UP:]), share) for taken, share in zip(times, shares, strict=True)]


def _segment_all(
    deployments: Sequence[Deployment], cases: list[Case], outputs: Sequence[Path], *, quiet: bool
) -> list[_Run]:
    runs = []
    with bar("Segment", quiet=quiet) as progress:
        for done, (deployment, output) in enumerate(zip(deployments, outputs, strict=True), 1):
            runs.append(_segment_apart(deployment, cases, output))
            progress(done, len(deployments))
    return runs


def _central_window(deployment: Deployment, engine: Engine, image: Any) -> np.ndarray:
    ready = deployment.preprocessing.apply(image).data
    grow = [
        (max(0, size - have) // 2, (max(0, size - have) + 1) // 2)
        for size, have in zip(engine.spec.window, ready.shape[1:], strict=True)
    ]
    padded = np.pad(ready, [(0, 0), *grow], constant_values=deployment.preprocessing.outside)
    starts = [(have - size) // 2 for size, have in zip(engine.spec.window, padded.shape[1:], strict=True)]
    x, y, z = (slice(start, start + size) for start, size in zip(starts, engine.spec.window, strict=True))
    return np.ascontiguousarray(padded[None, :, x, y, z], np.float32)


def _segment_apart(deployment: Deployment, cases: list[Case], output: Path) -> _Run:
    """Segment in a fresh process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_segment, deployment, cases, output).result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the process that ran {deployment.folder.name} died, likely for want of memory."
            ) from error


def _segment(deployment: Deployment, cases: list[Case], output: Path) -> _Run:
    from ptq3d.datasets.label_map import LabelMap

    unlabelled = [case.unlabelled() for case in cases]
    results = deploy_cases(
        deployment, unlabelled, output, label_map=LabelMap.identity(deployment.manifest.labels), quiet=True
    )
    for result in results:
        if result.error is not None:
            raise result.error
    return _Run(results, peak_memory_bytes())


def _judge(
    cases: Sequence[Case], output: Path, reference: Path, truths: Sequence[np.ndarray | None], classes: int
) -> _Verdict:
    """What the label maps in `output` are worth against the truth, and against those in `reference`."""
    dice, kept = [], []
    for case, truth in zip(cases, truths, strict=True):
        found = load_labels(output / f"{case.name}.nii.gz").data[0]
        if truth is not None:
            dice.append(dice_per_class(found, truth, classes))
        kept.append(fidelity_per_class(found, load_labels(reference / f"{case.name}.nii.gz").data[0], classes))
    return _Verdict(np.asarray(dice), np.asarray(kept))


def _change(first: np.ndarray, second: np.ndarray) -> Interval:
    return paired_bootstrap([mean_dice(case) for case in first], [mean_dice(case) for case in second])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os
    import platform

    from ptq3d.version import __version__

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "ptq3d": __version__,
    }


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
