"""Engines side by side: size, window latency in turn, whole cases in a process each, Dice, fidelity to the first."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from ptq3d.artefacts import artefact_size
from ptq3d.data import find_data, judged_by
from ptq3d.datasets.cases import Case, read_grid, read_image, true_classes
from ptq3d.datasets.label_map import LabelMap
from ptq3d.deployment import (
    CaseResult,
    Deployment,
    deploy_cases,
    prepare,
    warn_of_calibration_cases,
)
from ptq3d.engines.base import Engine, EngineOptions, LayerReport, Precision, int8_mac_share
from ptq3d.engines.latency import latency_ms
from ptq3d.errors import EngineError, OptionError
from ptq3d.evaluation.comparison import Comparison, Row
from ptq3d.evaluation.metrics import fidelity_per_class, mean_dice
from ptq3d.evaluation.scores import Score, csv_text, paired_means, score_case
from ptq3d.evaluation.statistics import (
    Interval,
    LatencySummary,
    NonInferiority,
    non_inferiority,
    paired_bootstrap,
    require_margin,
)
from ptq3d.evaluation.surfaces import require_surfaces, right_angled_spacing
from ptq3d.manifest import write_text
from ptq3d.memory import peak_memory_bytes
from ptq3d.options import CompareOptions
from ptq3d.progress import bar
from ptq3d.volumes.files import load_labels
from ptq3d.volumes.volume import Volume
from ptq3d.writing import Writing

WARM_UP = 2


def compare(options: CompareOptions) -> Comparison:
    """Measure engines or ONNX files side by side, FP32 first.

    Raises:
        OptionError: no model, one named twice, models of different classes, providers that no model uses, or scores asked for
            without labels.
        InputError: of the tree in `ptq3d.errors`, before the first measurement.
    """
    _require_meaning(options)
    deployments = [_deployment(text, options) for text in _distinct(options.models)]
    _require_providers_used(options, deployments)
    manifest = deployments[0].manifest
    _require_same_classes(options.models, deployments)
    found = find_data(options.data, options.labels, split=options.split, usual=("test", "val"), series=options.series)
    cases, label_map = judged_by(found, manifest, labels=options.labels, label_map=options.label_map)
    _require_labels_to_score(options, cases)
    for deployment in deployments:
        warn_of_calibration_cases(deployment.manifest, cases)
    for case in cases:
        _check(case, label_map, surfaces=options.tolerance is not None)
    with tempfile.TemporaryDirectory() as scratch:
        timed = _time_windows(deployments, cases[0], options)
        outputs = [(options.output or Path(scratch)) / name for name in folder_names(options.models)]
        runs = _segment_all(deployments, cases, outputs, quiet=options.quiet)
        judge = _Judge(cases, label_map, options.tolerance)
        judged = [judge.verdict(output, outputs[0]) for output in outputs]
    rows = tuple(
        _row(text, deployment, latency, run, _Change(verdict, judged[0], options.margin))
        for text, deployment, latency, run, verdict in zip(
            options.models, deployments, timed, runs, judged, strict=True
        )
    )
    if options.csv is not None:
        write_text(options.csv, csv_text({row.name: row.scores for row in rows}))
    notes = {
        "repetitions": options.repetitions,
        "threads": options.threads,
        "machine": machine(),
        "tolerance_mm": options.tolerance,
    }
    return Comparison(rows, label_map.names[1:], tuple(case.name for case in cases), manifest.window, notes)


@dataclass(frozen=True)
class _Timed:
    latency: LatencySummary
    layers: tuple[LayerReport, ...]

    @property
    def int8_mac_share(self) -> float:
        return int8_mac_share(self.layers)

    def precision(self, asked: str) -> str:
        """ "int8" where any layer runs so, "unknown" where the runtime does not tell of one, otherwise what most of it ran in."""
        ran: Counter[str] = Counter()
        for layer in self.layers:
            ran[layer.precision] += layer.macs
        most = max(ran, key=lambda kind: ran[kind], default=asked)
        return next((kind for kind in ("int8", "unknown") if kind in ran), most)


@dataclass(frozen=True)
class _Run:
    results: tuple[CaseResult, ...]
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Verdict:
    """Scores of all cases, empty without labels; fidelity of each class (cases, K - 1)."""

    scores: tuple[Score, ...]
    kept: np.ndarray


@dataclass(frozen=True)
class _Change:
    """A verdict and the first engine's, and the loss of mean Dice that does not matter."""

    verdict: _Verdict
    first: _Verdict
    margin: float | None

    @property
    def interval(self) -> Interval | None:
        means = self._means()
        return None if means is None else paired_bootstrap(*means)

    @property
    def non_inferiority(self) -> NonInferiority | None:
        means = self._means()
        return None if means is None or self.margin is None else non_inferiority(*means, margin=self.margin)

    def _means(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.verdict is self.first or not self.verdict.scores:
            return None
        cases, first, second = paired_means(self.first.scores, self.verdict.scores)
        return (first, second) if cases else None


def _row(name: str, deployment: Deployment, timed: _Timed, run: _Run, change: _Change) -> Row:
    verdict = change.verdict
    return Row(
        name=name,
        engine=deployment.manifest.engine["name"],
        precision=timed.precision(deployment.options.precision),
        size_bytes=artefact_size(deployment.folder, deployment.manifest),
        latency=timed.latency,
        case_seconds=tuple(result.seconds["total"] for result in run.results),
        peak_memory_bytes=run.peak_memory_bytes,
        int8_mac_share=timed.int8_mac_share,
        layers=tuple(vars(layer) for layer in timed.layers),
        scores=verdict.scores,
        fidelity=tuple(mean_dice(case) for case in verdict.kept),
        kept=verdict.kept,
        dice_change=change.interval,
        non_inferiority=change.non_inferiority,
    )


def _require_meaning(options: CompareOptions) -> None:
    """Refuse a margin, tolerance or number of runs without meaning, before anything is read."""
    if options.repetitions < 1:
        raise OptionError(f"--repetitions {options.repetitions}: time at least one run of a window.")
    if options.margin is not None:
        require_margin(options.margin)
    if options.tolerance is not None:
        require_surfaces(options.tolerance)


def _require_labels_to_score(options: CompareOptions, cases: Sequence[Case]) -> None:
    """Refuse what scores would be needed for, before anything is measured."""
    asked = [name for name in ("margin", "tolerance", "csv") if getattr(options, name) is not None]
    if asked and all(case.labels is None for case in cases):
        raise OptionError(
            f"--{asked[0]} is about true labels of the network's classes; give them with --labels, or say with "
            "--label-map what those of the data are."
        )


def _check(case: Case, label_map: LabelMap, *, surfaces: bool) -> None:
    """Read a case once, so that nothing is wrong with it after hours of measurement."""
    image = read_image(case)
    if true_classes(case, image.grid, label_map) is not None and surfaces:
        right_angled_spacing(image.affine, where=case.where)


def _truth(case: Case, label_map: LabelMap) -> Volume | None:
    """(1, X, Y, Z) classes of a case's labels, None where it has none."""
    grid = read_grid(case)
    truth = true_classes(case, grid, label_map)
    return None if truth is None else Volume(truth[None], grid[1])


def _distinct(models: Sequence[str]) -> Sequence[str]:
    if not models:
        raise OptionError("name the models to compare, FP32 first: ptq3d compare fp32.onnx int8.onnx --data DIR.")
    if len(set(models)) != len(models):
        raise OptionError(f"a model is named twice in: {' '.join(models)}.")
    return models


def _deployment(text: str, options: CompareOptions) -> Deployment:
    """PATH@ENGINE:PRECISION:DEVICE, of which all but PATH may be left out, as an engine with its manifest."""
    path, _, runtime = text.rpartition("@") if "@" in text else (text, "", "auto")
    engine, precision, device = (*runtime.split(":", 2), "", "")[:3]
    if precision and precision not in get_args(Precision):
        raise OptionError(
            f"'{text}': no precision '{precision}'. Write PATH@ENGINE:PRECISION with {', '.join(get_args(Precision))}."
        )
    chosen = cast(Precision, precision or "fp32")
    found = prepare(
        Path(path),
        engine or "auto",
        EngineOptions(device or "auto", chosen, options.threads),
        preprocessing=options.preprocessing,
        overlap=options.overlap,
    )
    if found.manifest.engine["name"] != "onnxruntime":
        return found
    return replace(found, options=replace(found.options, providers=options.providers))


def _require_providers_used(options: CompareOptions, deployments: Sequence[Deployment]) -> None:
    if options.providers and not any(one.options.providers for one in deployments):
        raise OptionError(
            f"--providers {' '.join(options.providers)} are ONNX Runtime's, and none of the models runs on it. "
            "Write PATH@onnxruntime, or leave them out."
        )


def _require_same_classes(models: Sequence[str], deployments: Sequence[Deployment]) -> None:
    for text, deployment in zip(models, deployments, strict=True):
        if deployment.manifest.classes != deployments[0].manifest.classes:
            raise OptionError(
                f"{text} has {deployment.manifest.classes} classes, {models[0]} has {deployments[0].manifest.classes}. "
                "Compare engines of one network."
            )


def folder_names(models: Sequence[str]) -> list[str]:
    """A folder for the label maps of each engine: its name on the command line, with its number where that is not its own."""
    plain = [
        "".join(c if c.isalnum() or c in "-_." else "_" for c in text.rstrip("/").split("/")[-1]) for text in models
    ]
    unique = [name if plain.count(name) == 1 and name.strip(".") else "" for name in plain]
    names: list[str] = []
    for number, (name, own) in enumerate(zip(plain, unique, strict=True), 1):
        made = own or f"{number}-{name.strip('.')}"
        while not own and made in (*names, *unique):
            made = f"{number}-{made}"
        names.append(made)
    return names


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
                taken.append(latency_ms(engine, window))
            progress(done + 1, rounds)
        ran = [engine.layers() for engine in engines]
    return [_Timed(LatencySummary.of(taken[WARM_UP:]), layers) for taken, layers in zip(times, ran, strict=True)]


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
    unlabelled = [case.unlabelled() for case in cases]
    results = deploy_cases(
        deployment, unlabelled, Writing(output), label_map=LabelMap.identity(deployment.manifest.labels), quiet=True
    )
    for result in results:
        if result.error is not None:
            raise result.error
    return _Run(results, peak_memory_bytes())


@dataclass(frozen=True)
class _Judge:
    """What label maps of `cases` are held against: the truth where it is known, with the names of all classes."""

    cases: Sequence[Case]
    label_map: LabelMap
    tolerance_mm: float | None

    def verdict(self, output: Path, reference: Path) -> _Verdict:
        """What the label maps in `output` are worth against the truth, and against those in `reference`."""
        scores: list[Score] = []
        kept = []
        names = self.label_map.names
        for case in self.cases:
            truth = _truth(case, self.label_map)
            found, expected = (load_labels(place / f"{case.name}.nii.gz").data[0] for place in (output, reference))
            kept.append(fidelity_per_class(found, expected, len(names)))
            if truth is not None:
                scores += score_case(case.name, found, truth, names=names, tolerance_mm=self.tolerance_mm)
        return _Verdict(tuple(scores), np.asarray(kept))


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
