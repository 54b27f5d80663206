"""The whole pipeline on made-up CT phantoms, from training to a report, in a few minutes on two cores."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from ptq3d.artefacts import build
from ptq3d.compare import compare
from ptq3d.datasets.phantoms import write_phantoms
from ptq3d.errors import OptionError
from ptq3d.evaluation.comparison import Comparison
from ptq3d.evaluation.figures import Bar, Slice, draw_report
from ptq3d.exporting import export
from ptq3d.manifest import write_text
from ptq3d.options import (
    BuildOptions,
    CalibrateOptions,
    CompareOptions,
    DemoOptions,
    ExportOptions,
    QuantizeOptions,
    TrainOptions,
)
from ptq3d.pipeline import calibrate, train
from ptq3d.progress import bar
from ptq3d.quantizing import quantize
from ptq3d.volumes.files import load_image, load_labels
from ptq3d.volumes.resample import reorient
from ptq3d.volumes.volume import Volume

log = logging.getLogger("ptq3d")

# what reaches a mean Dice above 0.8 on held-out phantoms within four minutes on two cores
SPACING = (3.0, 3.0, 4.0)
WINDOW = (64, 64, 48)
CHANNELS = (16, 32, 64, 128, 256)
STEPS = 400
LEARNING_RATE = 8e-3
BATCH_SIZE = 1


def demo(options: DemoOptions) -> Comparison | None:
    """Make phantoms, train, export, calibrate, quantize, build, segment the held-out ones, compare.

    Returns:
        The comparison; None where only the data was wanted.

    Raises:
        UnavailableError: the training libraries are not installed.
        OptionError: fewer than one case.
    """
    if options.train_cases < 1 or options.test_cases < 1:
        raise OptionError("the demo needs at least one phantom to train on and one to test on.")
    folder = options.output_dir
    data = options.data_only or folder / "data"
    with bar("Make phantoms", quiet=options.quiet) as progress:
        write_phantoms(data, train=options.train_cases, test=options.test_cases, seed=options.seed, progress=progress)
    if options.data_only is not None:
        return None
    log.info("1/5 train a U-Net on phantoms")
    trained = train(_training(options, data))
    log.info("    loss %.2f -> %.2f in %d steps", trained.losses[0], np.mean(trained.losses[-10:]), len(trained.losses))
    log.info("2/5 export to ONNX, checked against PyTorch")
    fp32 = export(ExportOptions(checkpoint=trained.last, output=folder / "unet_fp32.onnx", quiet=options.quiet))
    log.info("3/5 calibrate on training phantoms and quantize to INT8")
    windows = folder / "calibration.npz"
    calibrate(CalibrateOptions(data=data / "train/images", onnx_path=fp32.path, output=windows, quiet=options.quiet))
    int8 = quantize(
        QuantizeOptions(
            onnx_path=fp32.path, calibration_data=windows, output_path=folder / "unet_int8.onnx", quiet=options.quiet
        )
    )
    log.info("4/5 build the engines")
    engines = [build(BuildOptions(onnx_path=path)).path for path in (fp32.path, int8.path)]
    log.info("5/5 segment the held-out phantoms and compare")
    found = compare(
        CompareOptions(
            models=tuple(map(str, engines)),
            data=data / "test/images",
            labels=data / "test/labels",
            output=folder / "segmentations",
            repetitions=30,
            quiet=options.quiet,
        )
    )
    write_text(folder / "report.json", json.dumps(found.to_dict(), indent=1) + "\n")
    _draw(folder, data, found)
    return found


def _training(options: DemoOptions, data: Path) -> TrainOptions:
    return TrainOptions(
        data=data / "train/images",
        labels=data / "train/labels",
        output_dir=options.output_dir / "training",
        spacing=SPACING,
        window=WINDOW,
        channels=CHANNELS,
        max_steps=options.max_steps or STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        accelerator="cpu",
        precision="bf16-mixed",
        seed=options.seed,
        quiet=options.quiet,
    )


def _draw(folder: Path, data: Path, found: Comparison) -> None:
    """report.png: bars of all engines, and the slice of the first case that shows most organs."""
    name = found.cases[0]
    image = load_image(data / "test/images" / f"{name}.nii.gz")
    truth = load_labels(data / "test/labels" / f"{name.replace('img', 'label')}.nii.gz")
    maps = {"truth": truth}
    for row in found.rows:
        title = row.precision.upper()
        maps[title] = load_labels(folder / "segmentations" / Path(row.name).name / f"{name}.nii.gz")
    upright = {title: reorient(volume, "LPS").data[0] for title, volume in maps.items()}
    place = int(np.argmax([len(np.unique(upright["truth"][:, :, k])) for k in range(upright["truth"].shape[2])]))
    grey = reorient(image, "LPS")
    bars = [
        Bar(row.precision.upper(), row.size_bytes / 1e6, row.latency.median, row.latency.p5, row.latency.p95)
        for row in found.rows
    ]
    shown = Slice(
        image=_flat(grey, place),
        labels={title: labels[:, :, place].T for title, labels in upright.items()},
        spacing=(grey.spacing[1], grey.spacing[0]),
        window=(-175.0, 250.0),
    )
    change = found.rows[-1].dice_change
    moved = "" if change is None else f", change of mean Dice {change.mean:+.4f}"
    fidelity = float(np.mean(found.rows[-1].fidelity))
    draw_report(
        folder / "report.png",
        bars,
        shown,
        title=f"U-Net on CT phantoms, OpenVINO: INT8 keeps {fidelity:.2%} of FP32{moved}",
    )


def _flat(volume: Volume, place: int) -> np.ndarray:
    return volume.data[0, :, :, place].T
