"""FP32 ONNX -> Q/DQ ONNX by a recipe; anyone's Q/DQ file for another runtime."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from ptq3d.data import find_data, without_labels
from ptq3d.errors import GraphError, OptionError
from ptq3d.exporting import BELONGS_TO, ONNX, SOURCES, described, export, source_of
from ptq3d.graphs.files import load_graph, save_graph, static_input_shape
from ptq3d.graphs.low_precision import low_precision
from ptq3d.graphs.passes import is_quantized
from ptq3d.int8 import LIMITS, Scale
from ptq3d.manifest import Manifest, embed
from ptq3d.options import ExportOptions, QuantizeOptions, SourceOptions
from ptq3d.pipeline import Written, case_windows
from ptq3d.progress import Progress, bar
from ptq3d.quantization import calibration, planning, qdq, retargeting
from ptq3d.quantization.observation import Observations
from ptq3d.quantization.quantizer import Quantized, Recipe
from ptq3d.quantization.targets import Target, get_target
from ptq3d.recipes import Engines, tried_of, with_fewest_terms
from ptq3d.version import __version__
from ptq3d.volumes.source import sha256

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("ptq3d")
Rest = Literal["fp32", "fp16", "bf16"]
AnyQuantize = TypeVar("AnyQuantize", bound=QuantizeOptions)
NO_DATA = "--calibration-data is missing: windows or volumes to draw the ranges from."


@dataclass(frozen=True)
class Calibrated:
    """An FP32 graph with all that is needed to quantize it, again and again by different recipes.

    Args:
        model: the simplified FP32 graph.
        manifest: of its network.
        seen: what calibration saw.
        cases: calibration case -> SHA-256; empty where a file of windows was given.
        windows: how many were seen.
        some: a few of them, (1, C, X, Y, Z) float32, that recipes can be tried on.
    """

    model: ir.Model
    manifest: Manifest
    seen: Observations
    cases: Mapping[str, str]
    windows: int
    some: tuple[np.ndarray, ...] = ()


def with_onnx(options: AnyQuantize) -> AnyQuantize:
    """The options with an ONNX file in place of any other source, which is exported first, beside the output.

    Raises:
        OptionError: not exactly one source or several networks, no calibration data, or --retarget of what is no ONNX file.
        InputError: see `exporting.export`.
    """
    if source_of(options)[0] == ONNX:
        return options
    if options.retarget is not None:
        raise OptionError("--retarget takes a Q/DQ file: name it with --onnx.")
    if options.calibration_data is None:
        raise OptionError(NO_DATA)
    output = options.output_path
    fp32 = None if output is None else output.with_name(f"{output.stem.removesuffix('_int8')}_fp32.onnx")
    given = {field.name: getattr(options, field.name) for field in fields(SourceOptions)}
    path = export(ExportOptions(**given, output=fp32)).path
    log.info("%s: the FP32 network, exported first and checked", path)
    used: dict[str, Any] = {**dict.fromkeys((*SOURCES, *BELONGS_TO)), "folds": (), "window": None, ONNX: path}
    int8 = output or path.with_name(f"{path.stem.removesuffix('_fp32')}_int8.onnx")
    return replace(options, **used, output_path=int8)


def network_file(options: QuantizeOptions) -> Path:
    """The FP32 ONNX file of options that `with_onnx` has seen.

    Raises:
        OptionError: they name none.
    """
    if options.onnx_path is None:
        raise OptionError("no ONNX file is named. Give --onnx FILE.")
    return options.onnx_path


def observed(options: QuantizeOptions) -> Calibrated:
    """The FP32 graph of `options`, with what one pass over the calibration windows saw of it.

    Raises:
        GraphError: the graph is quantized already, dynamic, or invalid.
        CalibrationError: windows of another shape, NaN or infinite values.
    """
    model, manifest = _prepared_graph(options)
    windows, cases, total = _windows_for(options, model, manifest)
    placement = planning.place(model, get_target(options.target))
    some: list[np.ndarray] = []
    with bar("Calibrate", quiet=options.quiet) as progress:
        seen = calibration.observe(model, placement, _counted(windows, total, progress, some), total)
    return Calibrated(model, manifest, seen, cases, total, tuple(some))


def quantize(options: QuantizeOptions) -> Written:
    """FP32 ONNX or another source of weights -> Q/DQ ONNX: ranges from calibration, scales for a target, INT8 weights.

    Raises:
        GraphError: the graph is quantized already, dynamic, or invalid.
        CalibrationError: windows of another shape, NaN or infinite values.
        OptionError: a mode or type that is not written here.
    """
    check_modelopt_flags(options)
    options = with_onnx(options)
    if options.retarget is not None:
        return _retargeted(options, get_target(options.retarget))
    found = observed(options)
    with tempfile.TemporaryDirectory() as scratch:
        engines = Engines(found.model, found.seen, options.target, Path(scratch))
        recipe, evidence = settled(options, found, engines)
        return write_quantized(options, found, recipe, engines.made(recipe), evidence)


def settled(options: QuantizeOptions, found: Calibrated, engines: Engines) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that the options describe, with second terms that calibration windows call for where none are asked for; what
    was found out of them."""
    start = recipe_of(options)
    if options.second_terms is not None or get_target(options.target).mending is None:
        return start, {}
    with bar("Second terms", quiet=options.quiet) as progress:
        result = with_fewest_terms(engines, start, found.some, found.manifest.classes, progress=progress)
    log.info("%s", result)
    tried = {terms: None if math.isnan(lost) else lost for terms, lost in result.tried.items()}  # JSON has no NaN
    return result.recipe, {"second_terms_tried": tried}


def write_quantized(
    options: QuantizeOptions,
    found: Calibrated,
    recipe: Recipe,
    made: Quantized,
    evidence: Mapping[str, Any] | None = None,
) -> Written:
    """Write a Q/DQ graph with its certificate: what was done to it, and what is known of its answers.

    Args:
        options: say where to.
        found: what it was made from.
        recipe: that it was made by.
        made: the graph.
        evidence: what verification found, JSON-able.
    """
    facts = {
        "ptq3d": __version__,
        **recipe.to_dict(),
        "calibration_cases": dict(found.cases),
        "calibration_windows": found.windows,
        "int8_layers": list(made.plan.layers),
        "two_term_layers": list(made.split),
        "float_layers": dict(made.kept),
        "int8_mac_share": made.int8_mac_share,
        "ranges": {name: _real_range(scale) for name, scale in made.plan.activations.items()},
        **(evidence or {}),
    }
    fp32 = network_file(options)
    source = {fp32.name: sha256(fp32)}
    embed(made.model, replace(found.manifest, quantization=facts, source=source))
    output = output_of(options)
    save_graph(made.model, output)
    return Written(output, output.stat().st_size, {**facts, "fp32_size_bytes": fp32.stat().st_size})


def output_of(options: QuantizeOptions) -> Path:
    """The Q/DQ file to write: as asked for, else beside the ONNX file and named after it."""
    path = network_file(options)
    return options.output_path or path.with_name(f"{path.stem}_{options.retarget or 'int8'}.onnx")


def _real_range(scale: Scale) -> list[float]:
    """[low, high] that a scale of one step covers, in the tensor's own unit."""
    lowest, highest = LIMITS[scale.dtype]
    zero_point, step = int(scale.zero_point), float(scale.step)
    return [(lowest - zero_point) * step, (highest - zero_point) * step]


def recipe_of(options: QuantizeOptions) -> Recipe:
    """The recipe that the options describe."""
    return Recipe(
        target=options.target,
        calibration_method=options.calibration_method,
        equalize=options.equalize,
        second_terms=_most(options.target) if options.second_terms is None else options.second_terms,
        rounding=options.rounding,
        keep=tuple(options.keep),
        high_precision_dtype=_rest(options),
    )


def _rest(options: QuantizeOptions) -> Rest:
    """The type of what stays in floating point."""
    asked = options.high_precision_dtype
    return get_target(options.target).rest if asked == "auto" else asked


def _most(target: str) -> float:
    """The share of the work that a target may spend on sensitive layers."""
    prices = get_target(target).mending
    return 0.0 if prices is None else prices.most


def _counted(
    windows: Iterable[np.ndarray], total: int, progress: Progress, some: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """The windows; those that recipes are tried on go into `some`, too."""
    wanted = tried_of(total)
    for done, window in enumerate(islice(windows, total), 1):
        if done - 1 in wanted:
            some.append(window)
        yield window
        progress(done, total)


def _retargeted(options: QuantizeOptions, target: Target) -> Written:
    """A Q/DQ file of anyone's -> one for `target`, with its own scales."""
    if options.calibration_data is not None:
        raise OptionError(
            "--retarget keeps the scales that the file has, --calibration-data makes new ones: give one of them. "
            "New scales need the FP32 file."
        )
    if options.target not in (QuantizeOptions.target, target.name):
        raise OptionError(
            f"--target {options.target} and --retarget {target.name} name two runtimes. Give one of them."
        )
    path = network_file(options)
    model = load_graph(path)
    if not is_quantized(model):
        raise GraphError(f"{path} holds no Q/DQ to retarget. Quantize it with --calibration-data.")
    model, manifest = described(options, model, path)
    model, foreign = qdq.read(model)
    result = retargeting.retarget(model, foreign, target, keep=options.keep)
    asked = options.high_precision_dtype
    rest: Rest = "fp32" if asked == "auto" else asked
    plan = planning.in_type(result.plan, rest)
    digest = {path.name: sha256(path)}
    recipe = {
        "ptq3d": __version__,
        "target": target.name,
        "high_precision_dtype": rest,
        "retargeted_from": digest,
        "int8_layers": list(plan.layers),
        "float_layers": dict(result.kept),
        "int8_mac_share": planning.int8_mac_share(model, plan),
        "rescaled_tensors": list(result.rescaled),
        "dropped_tensors": list(result.dropped),
    }
    written = qdq.write(model, plan)
    if rest != "fp32":
        low_precision(written, rest)
    embed(written, replace(manifest, quantization=recipe, source=digest))
    output = output_of(options)
    save_graph(model, output)
    return Written(output, output.stat().st_size, {**recipe, "source_size_bytes": path.stat().st_size})


def check_modelopt_flags(options: QuantizeOptions) -> None:
    """Refuse what ModelOpt's command line offers and ptq3d does not write.

    Raises:
        OptionError: naming the flag.
    """
    if options.quantize_mode != "int8":
        raise OptionError(f"--quantize-mode {options.quantize_mode}: ptq3d writes int8 only.")


def _prepared_graph(options: QuantizeOptions) -> tuple[ir.Model, Manifest]:
    path = network_file(options)
    model = load_graph(path)
    if is_quantized(model):
        raise GraphError(
            f"{path} is quantized already. Quantize its FP32 file, deploy it as it is, or write it for another "
            "runtime with --retarget."
        )
    model, manifest = described(options, model, path)
    if static_input_shape(model)[0] != 1:
        raise GraphError(
            f"{path} takes {static_input_shape(model)[0]} windows at a time; calibration gives one. Export it with a batch of 1, or free."
        )
    return model, manifest


def _windows_for(
    options: QuantizeOptions, model: ir.Model, manifest: Manifest
) -> tuple[Iterable[np.ndarray], dict[str, str], int]:
    """(windows, cases they come from, their number); the cases of a folder are known once it was read."""
    _, channels, *window = static_input_shape(model)
    data = options.calibration_data
    if data is None:
        raise OptionError(NO_DATA)
    if data.suffix not in calibration.SUFFIXES:
        if manifest.preprocessing is None:
            raise OptionError(
                "volumes are given, but nothing says how to prepare them. Give --preprocessing btcv | FILE."
            )
        hashes: dict[str, str] = {}
        cases = list(
            without_labels(find_data(data, split=options.split, usual=("train",), series=options.series)).cases
        )
        size = (window[0], window[1], window[2])
        prepared = manifest.preprocessing
        drawn = case_windows(cases, prepared, size, options.number, seed=options.seed, hashes=hashes)
        return drawn, hashes, options.number
    if options.split is not None or options.series is not None:
        raise OptionError(f"--split and --series choose volumes, but {data} holds windows; leave them out.")
    found = calibration.open_windows(data, (channels, window[0], window[1], window[2]))
    return found, dict(found.cases), found.number
