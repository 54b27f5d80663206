"""Training of any network of the zoo: our preprocessing, MONAI's loss and augmentations, Lightning's loop.

    options.py     what is chosen and what comes back
    cases.py       image and label files -> checked, preprocessed cases in memory
    segmenter.py   the network inside Lightning: loss, windows, optimiser, validation

Devices, nodes, precision, resuming, checkpoints and TensorBoard are Lightning's.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq3d.errors import CheckpointError, OptionError, UnavailableError
from ptq3d.models import build_network, find_architecture
from ptq3d.models.sources import DESCRIPTION, read_description
from ptq3d.training.options import PRECISIONS, TrainingOptions, TrainingResult, check_options, schedule_of

if TYPE_CHECKING:
    from ptq3d.training.segmenter import Segmenter

__all__ = ["PRECISIONS", "TrainingOptions", "TrainingResult", "train"]

REQUIRED = ("lightning", "monai", "tensorboard")
CLIP_NORM = 1.0
EXPECTED = (  # warnings that tell nothing here, by how they begin
    r"The '\w+_dataloader' does not have many workers",  # windows are cut from memory; `workers` is the user's choice
    r"Checkpoint directory .* exists and is not empty",  # a second run replaces the files of the first
    r"Grad strides do not match bucket view strides",  # channels last, of a 1x1x1 head: one small copy a step
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 with torch 2.13
)


def train(options: TrainingOptions) -> TrainingResult:
    """Train a network; keep its best and its last checkpoint.

    loss = Dice + cross entropy over the batch (MONAI's DiceCE), AdamW, one-cycle learning rate. On a CPU the same seed
    gives the same losses to the last bit; GPU kernels that add in any order may change the last digits.

    Checkpoints load with `torch.load(weights_only=True)` and carry the dict "ptq3d": `architecture`, `in_channels`,
    `num_classes`, `channels`, `labels`, `preprocessing`, `window`, `overlap`.

    Raises:
        UnavailableError: lightning, monai or tensorboard is not installed, or the accelerator is not there.
        OptionError: options without a meaning, nothing left to resume, or a loss that stops being a number.
        FileError, GeometryError, IntensityError, LabelError, ShapeError: the data or the window cannot be used; raised
            before anything is written.
        CheckpointError: `resume` is not a checkpoint of this training.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise UnavailableError(f"training needs {', '.join(missing)}: pip install 'ptq3d[train]'")
    check_options(options)
    _check_half(options)
    with _quiet_libraries():
        return _fit(options, _segmenter(options))


def _segmenter(options: TrainingOptions) -> Segmenter:
    """Everything that can be wrong with the data is found here, before the first file is written."""
    import torch

    from ptq3d.training.cases import read_cases, split_cases
    from ptq3d.training.segmenter import Segmenter

    cases = read_cases(options)
    parts = split_cases(cases, options)
    description = _describe(options, int(cases[0].image.shape[0]))
    if options.resume is not None:
        _check_resume(options.resume, description)
    torch.manual_seed(options.seed)
    network = build_network(
        options.architecture,
        in_channels=description["in_channels"],
        num_classes=description["num_classes"],
        channels=options.channels,
        window=options.window,
    )
    return Segmenter(network, options, description=description, cases=parts)


def _check_half(options: TrainingOptions) -> None:
    """Lightning would train in bfloat16 instead and only warn."""
    import torch

    on_cpu = options.accelerator == "cpu" or (options.accelerator == "auto" and not torch.cuda.is_available())
    if options.precision == "16-mixed" and on_cpu:
        raise UnavailableError("precision 16-mixed needs a GPU. On a CPU choose bf16-mixed or 32-true.")


def _describe(options: TrainingOptions, in_channels: int) -> dict[str, Any]:
    name, architecture = find_architecture(options.architecture)
    return {
        "architecture": name,
        "in_channels": in_channels,
        "num_classes": len(options.label_map.names),
        "channels": list(options.channels or architecture.channels),
        "labels": list(options.label_map.names),
        "preprocessing": options.preprocessing.to_dict(),
        "window": list(options.window),
        "overlap": options.overlap,
    }


def _check_resume(path: Path, description: Mapping[str, Any]) -> None:
    found = read_description(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint of `ptq3d train`. Resume from a last.ckpt that it wrote.")
    for key, value in description.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"{path}: was trained with {key} {found.get(key)!r}, the options say {value!r}. "
                "Resume with the options it was begun with."
            )


def _fit(options: TrainingOptions, segmenter: Segmenter) -> TrainingResult:
    trainer = _trainer(options, segmenter)
    schedule = schedule_of(options, len(segmenter.training_cases), trainer.world_size)
    trainer.fit_loop.max_epochs = schedule.epochs  # known only now: the trainer says how many processes there are
    trainer.fit(segmenter, ckpt_path=options.resume, weights_only=True)
    if not segmenter.losses:
        raise OptionError(f"{options.resume}: all {schedule.epochs} epochs are done. Nothing is left to train.")
    released = None
    if options.seed_checkpoint and trainer.is_global_zero:
        released = _save_seed_checkpoint(segmenter, options.output_dir, epoch=trainer.current_epoch)
    return TrainingResult(
        best=options.output_dir / "best.ckpt",
        last=options.output_dir / "last.ckpt",
        losses=tuple(segmenter.losses),
        validation_dice=tuple(segmenter.validation_dice),
        seed_checkpoint=released,
        main_process=bool(trainer.is_global_zero),
    )


def _trainer(options: TrainingOptions, segmenter: Segmenter) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    validates = len(segmenter.validation_cases) > 0
    common = {"dirpath": options.output_dir, "save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(
        filename="best",
        monitor="val_dice" if validates else "train_loss_epoch",
        mode="max" if validates else "min",
        **common,
    )
    # Lightning's own `save_last` writes nothing in an epoch that is not the best.
    last = ModelCheckpoint(filename="last", **common)
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            precision=options.precision,
            gradient_clip_val=CLIP_NORM,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            limit_val_batches=None if validates else 0,
            log_every_n_steps=1,
            callbacks=[best, last],
            logger=TensorBoardLogger(options.output_dir, name="logs", version=""),
            enable_model_summary=False,
            enable_progress_bar=not options.quiet and sys.stderr.isatty(),
        )
    except (MisconfigurationException, ValueError) as error:
        raise UnavailableError(
            f"accelerator '{options.accelerator}' with {options.devices} device(s) cannot be had: {error} "
            "Choose another accelerator or fewer devices."
        ) from error


def _save_seed_checkpoint(segmenter: Segmenter, folder: Path, *, epoch: int) -> Path:
    """The end of training as the seed's repository stores it: `epoch`, `model_state_dict`; and our description."""
    import torch

    path = folder / f"checkpoint_epoch_{epoch}.pth"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    weights = {name: value.detach().cpu().contiguous() for name, value in segmenter.network.state_dict().items()}
    try:
        torch.save({"epoch": epoch, "model_state_dict": weights, DESCRIPTION: segmenter.description}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without Lightning's notes on devices and its own products, and the warnings that our choices answer for."""
    chatty = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in chatty]
    try:
        for logger in chatty:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
