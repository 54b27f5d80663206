"""What a training is told and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import OptionError
from ptq3d.models import check_window
from ptq3d.volumes.preprocessing import Preprocessing

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
DEFAULT_EPOCHS = 100


@dataclass(frozen=True)
class TrainingOptions:
    """The whole choice of one training.

    Attributes:
        cases: images with their label maps.
        output_dir: receives `best.ckpt`, `last.ckpt` and TensorBoard's `logs/`.
        label_map: names of the classes, and which value in a label file is which class.
        preprocessing: what is done to a volume before the network sees it; written into the checkpoints.
        architecture: name or alias in `ptq3d.models.ARCHITECTURES`.
        channels: features per level, the published ones where None.
        window: (X, Y, Z) voxels of the preprocessed grid that the network sees at once.
        overlap: share of a window that its neighbour covers, in validation and later in deployment.
        batch_size: windows per device and step.
        epochs: times that every training case gives `windows_per_case` windows; 100 where `max_steps` is None too.
        max_steps: optimiser steps instead of `epochs`.
        windows_per_case: windows of each training case and epoch.
        learning_rate: the highest of the one-cycle schedule.
        val_fraction: share of the cases kept for validation, at least one case where it is above 0.
        seed: weights, split, windows, augmentation: everything random follows from it.
        accelerator: Lightning's name of the kind of device: "auto", "cpu", "gpu".
        devices: how many of them on each node, or "auto" for all.
        num_nodes: machines that train together.
        precision: one of `PRECISIONS`.
        workers: processes that cut and augment windows; 0 does it in the training process.
        resume: a `last.ckpt` to go on from, with the options it was begun with.
        seed_checkpoint: also write `checkpoint_epoch_{N}.pth` in the layout of the seed's repository.
        quiet: no progress bar.
    """

    cases: tuple[Case, ...]
    output_dir: Path
    label_map: LabelMap
    preprocessing: Preprocessing
    architecture: str = "unet"
    channels: tuple[int, ...] | None = None
    window: tuple[int, int, int] = (96, 96, 96)
    overlap: float = 0.5
    batch_size: int = 2
    epochs: int | None = None
    max_steps: int | None = None
    windows_per_case: int = 4
    learning_rate: float = 3e-3
    val_fraction: float = 0.1
    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    precision: str = "32-true"
    workers: int = 0
    resume: Path | None = None
    seed_checkpoint: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind.

    Attributes:
        best: checkpoint of the epoch with the highest validation Dice; without validation, the lowest training loss.
        last: checkpoint of the end, with all that resuming needs.
        losses: loss of every step of this run, on the windows of this process.
        validation_dice: mean Dice over validation cases and foreground classes, once for each epoch of this run.
        seed_checkpoint: `checkpoint_epoch_{N}.pth`, where it was wanted.
        main_process: False in the processes that Lightning starts for further devices; only the main one should report.
    """

    best: Path
    last: Path
    losses: tuple[float, ...]
    validation_dice: tuple[float, ...]
    seed_checkpoint: Path | None = None
    main_process: bool = True


@dataclass(frozen=True)
class Schedule:
    """Lengths of a training.

    Attributes:
        epochs: times that validation runs and checkpoints are written.
        steps: optimiser steps of all epochs together.
    """

    epochs: int
    steps: int

    def steps_of(self, epoch: int) -> int:
        """Steps of one epoch. They add up to `steps`, so that a limit in steps still ends with a whole epoch."""
        return (epoch + 1) * self.steps // self.epochs - epoch * self.steps // self.epochs


def schedule_of(options: TrainingOptions, cases: int, processes: int) -> Schedule:
    """Epochs and steps for so many training cases and processes.

    Args:
        options: `epochs` or `max_steps`, `windows_per_case` and `batch_size` count here.
        cases: training cases, at least 1.
        processes: devices of all nodes together; each takes `batch_size` windows a step.
    """
    natural = -(-cases * options.windows_per_case // (options.batch_size * processes))
    if options.max_steps is not None:
        return Schedule(max(1, round(options.max_steps / natural)), options.max_steps)
    epochs = options.epochs or DEFAULT_EPOCHS
    return Schedule(epochs, epochs * natural)


def check_options(options: TrainingOptions) -> None:
    """Refuse options without a meaning, before a file is read.

    Raises:
        OptionError: a value out of its range, an unknown network or precision.
        ShapeError: the network cannot take windows of this size.
    """
    check_window(options.architecture, options.window, options.channels)
    if options.precision not in PRECISIONS:
        raise OptionError(f"precision '{options.precision}' is not known. Choose one of: {', '.join(PRECISIONS)}.")
    if options.epochs is not None and options.max_steps is not None:
        raise OptionError("epochs and max_steps both say how long to train. Give one of them.")
    for name in ("batch_size", "epochs", "max_steps", "windows_per_case", "num_nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}.")
    for name in ("val_fraction", "overlap"):
        if not 0 <= getattr(options, name) < 1:
            raise OptionError(f"{name} must be at least 0 and below 1, got {getattr(options, name)}.")
    if not options.learning_rate > 0:
        raise OptionError(f"learning_rate must be above 0, got {options.learning_rate}.")
    for name in ("seed", "workers"):
        if getattr(options, name) < 0:
            raise OptionError(f"{name} must be at least 0, got {getattr(options, name)}.")
