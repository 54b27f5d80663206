"""The command line: one function a verb. Options are the dataclasses of `ptq3d.options`; what is printed is here."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import subcommand

from ptq3d.errors import FileError, Ptq3dError, numbered
from ptq3d.options import (
    BuildOptions,
    CalibrateOptions,
    Common,
    CompareOptions,
    DataCheckOptions,
    DataOptions,
    DataShowOptions,
    DemoOptions,
    DeployOptions,
    EvaluateOptions,
    ExportOptions,
    InspectOptions,
    QuantizeOptions,
    SensitivityOptions,
    TrainOptions,
)
from ptq3d.tables import MEGABYTE, cases_table, compare_table, deploy_table, new_table, problems_table, show_table

if TYPE_CHECKING:
    from rich.table import Table

    from ptq3d.deployment import CaseResult


def show_data(options: DataShowOptions) -> None:
    """Run `ptq3d data show`."""
    found, cases = _verb("ptq3d.checking", "show")(options)
    table = new_table("case", "split", "image", "channels", "voxels", "spacing mm", "axes", "labels")
    for case in cases:
        table.add_row(*case)
    _show(options, table)
    for one in found.ignored:
        _say(options, f"  ignored: {one.path} ({one.reason})")
    _report(options, found.to_dict())


def check_data(options: DataCheckOptions) -> None:
    """Run `ptq3d data check`."""
    checked = _verb("ptq3d.checking", "check")(options)
    _show(options, cases_table(checked.cases))
    if checked.problems:
        _show(options, problems_table(checked.problems))
    _report(options, checked.to_dict())
    told = checked.told
    if checked.errors:
        raise FileError(f"{options.data} is not fit for use: {told}.")
    _say(options, told)


def train(options: TrainOptions) -> None:
    """Run `ptq3d train`."""
    result = _verb("ptq3d.pipeline", "train")(options)
    if not result.main_process:
        return
    _say(
        options,
        f"{result.best}: best checkpoint; loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {len(result.losses)} steps",
    )
    _report(options, {"best": str(result.best), "last": str(result.last), "losses": list(result.losses)})


def export(options: ExportOptions) -> None:
    """Run `ptq3d export`."""
    written = _verb("ptq3d.exporting", "export_all")(options)
    files = [{"path": str(one.path), "size_bytes": one.size_bytes, **one.facts} for one in written]
    for one in written:
        _say(options, f"{one.path}: {_size(one.size_bytes)}, {one.facts['network']}{_checked(one.facts)}")
    _report(options, files[0] if len(files) == 1 else {"files": files})


def _checked(facts: Mapping[str, Any]) -> str:
    """What an export says of PyTorch; nothing where the source was ONNX."""
    if "max_relative_error" not in facts:
        return ""
    error, same = facts["max_relative_error"], facts["label_agreement"]
    return f"; differs from PyTorch by {error:.1e} of the logits' span at most, {same:.3%} of the labels are equal"


def calibrate(options: CalibrateOptions) -> None:
    """Run `ptq3d calibrate`."""
    written = _verb("ptq3d.pipeline", "calibrate")(options)
    facts = written.facts
    size, cases = " x ".join(map(str, facts["window"])), numbered(len(facts["cases"]), "case")
    _say(options, f"{written.path}: {facts['windows']} windows of {size} voxels from {cases}")
    _report(options, {"path": str(written.path), "size_bytes": written.size_bytes, **facts})


def quantize(options: QuantizeOptions) -> None:
    """Run `ptq3d quantize`."""
    written = _verb("ptq3d.verification", "quantize")(options)
    facts = written.facts
    before = facts.get("fp32_size_bytes", facts.get("source_size_bytes", 0))
    _say(
        options,
        f"{written.path}: {_size(before)} -> {_size(written.size_bytes)} ({before / written.size_bytes:.2f} x smaller), "
        f"{len(facts['int8_layers'])} layers with {facts['int8_mac_share']:.1%} of the multiply-accumulates planned in INT8",
    )
    for name, why in facts["float_layers"].items():
        _say(options, f"  floating point: {name} ({why})")
    for name in facts.get("rescaled_tensors", ()):
        _say(options, f"  another step, same range: {name}")
    _report(options, {"path": str(written.path), "size_bytes": written.size_bytes, **facts})


def sensitivity(options: SensitivityOptions) -> None:
    """Run `ptq3d sensitivity`."""
    found = _verb("ptq3d.verification", "sensitivity")(options)
    table = new_table("layer", "MMAC", "share", "disagreement alone in INT8")
    whole = sum(one.macs for one in found)
    for one in found:
        table.add_row(one.layer, f"{one.macs / 1e6:.1f}", f"{one.macs / whole:.1%}", f"{one.disagreement:.5f}")
    _show(options, table)
    _report(options, {"layers": [vars(one) for one in found]})


def build(options: BuildOptions) -> None:
    """Run `ptq3d build`."""
    written = _verb("ptq3d.artefacts", "build")(options)
    _say(options, f"{written.path}: {_size(written.size_bytes)} for {written.facts['engine']} ({written.facts['why']})")
    _report(options, {"path": str(written.path), "size_bytes": written.size_bytes, **written.facts})


def deploy(options: DeployOptions) -> None:
    """Run `ptq3d deploy`."""
    results: tuple[CaseResult, ...] = _verb("ptq3d.deployment", "deploy")(options)
    done = [result for result in results if result.error is None]
    failed = [result for result in results if result.error is not None]
    if done:
        _show(options, deploy_table(done))
        _say(options, f"{numbered(len(done), 'label map')} in {done[0].labels.parent}")
    rows = [
        {
            "case": r.name,
            "image": r.image,
            "labels": str(r.labels),
            "seconds": dict(r.seconds),
            "windows": r.windows,
            "windows_per_second": r.windows_per_second,
            "peak_memory_bytes": r.peak_memory_bytes,
            "dice": _finite(r.dice),
            "mean_dice": _number(r.mean_dice),
        }
        for r in done
    ]
    errors = {r.name: f"{type(r.error).__name__}: {r.error}" for r in failed}
    _report(options, {"cases": rows, "failed": errors})
    if failed:
        raise _worst(failed, len(results))


def _worst(failed: Sequence[CaseResult], number: int) -> Ptq3dError:
    """One error for all cases that failed, of the kind with the gravest exit code."""
    errors = [result.error for result in failed if result.error is not None]
    grave = min(errors, key=lambda error: error.exit_code)
    told = "; ".join(f"{result.name}: {result.error}" for result in failed)
    return type(grave)(
        told if number == 1 else f"{len(failed)} of {number} cases failed, the others are written. {told}"
    )


def compare(options: CompareOptions) -> None:
    """Run `ptq3d compare`."""
    found = _verb("ptq3d.compare", "compare")(options)
    _show(options, compare_table(found))
    for sentence in found.sentences():
        _say(options, sentence)
    _report(options, found.to_dict())


def evaluate(options: EvaluateOptions) -> None:
    """Run `ptq3d evaluate`; a claim that is not shown is an answer, not a fault: exit code 0."""
    found = _verb("ptq3d.scoring", "evaluate")(options)
    table = new_table(*found.columns)
    for row in found.rows():
        table.add_row(*row)
    _show(options, table)
    for sentence in found.sentences():
        _say(options, sentence)
    _report(options, found.to_dict())


def inspect(options: InspectOptions) -> None:
    """Run `ptq3d inspect`."""
    found = _verb("ptq3d.inspection", "inspect")(options)
    table = new_table("", "", right=False)
    for key, value in found.facts.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict | list) else str(value))
    _show(options, table)
    if found.layers:
        listed = new_table("layer", "operator", "MMAC", "precision")
        for layer in found.layers:
            listed.add_row(layer.name, layer.op, f"{layer.macs / 1e6:.1f}", layer.precision)
        _show(options, listed)
    _report(options, found.to_dict())


def demo(options: DemoOptions) -> None:
    """Run `ptq3d demo`."""
    found = _verb("ptq3d.demo", "demo")(options)
    if found is None:
        _say(
            options,
            f"{options.data_only}: {options.train_cases} training and {options.test_cases} test phantoms in BTCV layout",
        )
        return
    _show(options, compare_table(found))
    _say(options, f"{options.output_dir}: checkpoint, ONNX files, label maps, report.json and report.png")
    _report(options, found.to_dict())


VERBS: Mapping[type[Common], Callable[..., None]] = {
    DataShowOptions: show_data,
    DataCheckOptions: check_data,
    TrainOptions: train,
    ExportOptions: export,
    CalibrateOptions: calibrate,
    QuantizeOptions: quantize,
    SensitivityOptions: sensitivity,
    BuildOptions: build,
    DeployOptions: deploy,
    CompareOptions: compare,
    EvaluateOptions: evaluate,
    InspectOptions: inspect,
    DemoOptions: demo,
}

Command = (
    Annotated[DataOptions, subcommand("data")]
    | Annotated[TrainOptions, subcommand("train")]
    | Annotated[ExportOptions, subcommand("export")]
    | Annotated[CalibrateOptions, subcommand("calibrate")]
    | Annotated[QuantizeOptions, subcommand("quantize")]
    | Annotated[SensitivityOptions, subcommand("sensitivity")]
    | Annotated[BuildOptions, subcommand("build")]
    | Annotated[DeployOptions, subcommand("deploy")]
    | Annotated[CompareOptions, subcommand("compare")]
    | Annotated[EvaluateOptions, subcommand("evaluate")]
    | Annotated[InspectOptions, subcommand("inspect")]
    | Annotated[DemoOptions, subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a fault, 2 for the user's mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        from ptq3d.version import __version__

        sys.stdout.write(f"ptq3d {__version__}\n")
        return 0
    options = tyro.cli(
        Command,
        args=given,
        prog="ptq3d",
        description=DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    return run(options.verb if isinstance(options, DataOptions) else options)


DESCRIPTION = (
    "Real INT8 engines for 3D medical image segmentation networks, with the evidence that the segmentations did not change. "
    "Research use, not a medical device."
)


def run(options: Common) -> int:
    """Run the verb that `options` belong to; errors of ptq3d become one line on stderr and an exit code."""
    with _messages(quiet=options.quiet):
        try:
            for path in (options.report, getattr(options, "csv", None)):
                if path is not None:
                    _verb("ptq3d.manifest", "require_writable")(path)
            VERBS[type(options)](options)
        except (Ptq3dError, OSError) as error:
            if options.debug:
                raise
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            return error.exit_code if isinstance(error, Ptq3dError) else 1
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130
    return 0


@contextmanager
def _messages(*, quiet: bool) -> Iterator[None]:
    """News of the package go to stdout, its warnings to stderr."""
    log = logging.getLogger("ptq3d")
    log.setLevel(logging.INFO)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    warnings.setLevel(logging.ERROR if quiet else logging.WARNING)
    news = logging.StreamHandler(sys.stdout)
    news.addFilter(lambda record: record.levelno == logging.INFO and not quiet)
    log.handlers[:] = [warnings, news]
    try:
        yield
    finally:
        log.handlers.clear()


def _verb(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _report(options: Common, content: Mapping[str, Any]) -> None:
    if options.report is not None:
        from ptq3d.manifest import write_text

        write_text(options.report, json.dumps(content, indent=1, default=str) + "\n")


def _say(options: Common, line: str) -> None:
    if not options.quiet:
        sys.stdout.write(line + "\n")


def _show(options: Common, table: Table) -> None:
    if not options.quiet:
        show_table(table)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / MEGABYTE:.2f} MB"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
