"""The network inside Lightning: MONAI's loss and augmentations, optimiser, validation by sliding windows.

Importing this loads lightning and monai; `ptq3d.training.train` does so after it has checked that they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from monai import transforms
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ptq3d.errors import OptionError
from ptq3d.models.sources import DESCRIPTION
from ptq3d.training.cases import TrainingCase
from ptq3d.training.options import Schedule, TrainingOptions, schedule_of

WEIGHT_DECAY = 1e-5
RISING = 0.3  # share of the steps in which the learning rate rises


class Segmenter(lightning.LightningModule):  # type: ignore[misc]  # lightning is untyped here
    """A network with what training needs.

    Attributes:
        network: the network itself; `state_dict` keys are its own behind "network.".
        losses: loss of every step so far.
        validation_dice: mean validation Dice of every epoch so far.

    Args:
        network: (N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) logits.
        options: of the training.
        description: plain values for the checkpoint, as `ptq3d.models.sources.read_description` gives them back.
        cases: training and validation cases.
    """

    def __init__(
        self,
        network: nn.Module,
        options: TrainingOptions,
        *,
        description: dict[str, Any],
        cases: tuple[Sequence[TrainingCase], Sequence[TrainingCase]],
    ) -> None:
        super().__init__()
        # Channels last is the layout of oneDNN's and cuDNN's convolutions: a step takes a fifth less time on a CPU.
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.options, self.description = options, description
        self.training_cases, self.validation_cases = cases
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        self.losses: list[float] = []
        self.validation_dice: list[float] = []

    @property
    def schedule(self) -> Schedule:
        """Epochs and steps, once the trainer has said how many processes there are."""
        return schedule_of(self.options, len(self.training_cases), self.trainer.world_size)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW under a one-cycle schedule over all steps."""
        rate = self.options.learning_rate
        optimizer = torch.optim.AdamW(self.network.parameters(), rate, weight_decay=WEIGHT_DECAY)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.schedule.steps, pct_start=RISING)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def train_dataloader(self) -> Any:
        """Windows of one epoch. Its random numbers follow from seed, epoch and process: a resumed run goes on alike."""
        epoch = self.current_epoch
        rng = np.random.default_rng([self.options.seed, epoch])
        wanted = self.schedule.steps_of(epoch) * self.options.batch_size * self.trainer.world_size
        rounds = -(-wanted // len(self.training_cases))
        order = np.concatenate([rng.permutation(len(self.training_cases)) for _ in range(rounds)])[:wanted]
        return DataLoader(
            Dataset([_fields(self.training_cases[index]) for index in order], window_transform(self.options)),
            batch_size=self.options.batch_size,
            num_workers=self.options.workers,
            generator=torch.Generator().manual_seed(int(rng.integers(2**31)) + self.global_rank),
        )

    def val_dataloader(self) -> Any:
        """Whole validation cases, one at a time; none where there are none."""
        cases = [{"image": case.image, "label": case.classes} for case in self.validation_cases]
        return DataLoader(Dataset(cases), batch_size=1)

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        """DiceCE of one batch.

        Raises:
            OptionError: the loss is no longer a number.
        """
        images = batch["image"].contiguous(memory_format=torch.channels_last_3d)
        loss: Tensor = self.loss(self.network(images).float(), batch["label"])
        self.losses.append(loss.item())
        if not np.isfinite(self.losses[-1]):
            raise OptionError(
                f"the training loss is {self.losses[-1]} at step {self.global_step}. "
                f"Lower the learning rate ({self.options.learning_rate}), or train with precision 32-true."
            )
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        """Mean Dice of one case, by Gaussian sliding windows as in deployment."""
        logits = sliding_window_inference(
            batch["image"],
            self.options.window,
            self.options.batch_size,
            lambda windows: self.network(windows).float(),
            overlap=self.options.overlap,
            mode="gaussian",
            cval=self.options.preprocessing.outside,
        )
        dice = dice_per_class(logits.argmax(1), batch["label"][:, 0], logits.shape[1])
        self.log("val_dice", dice.nanmean(), on_epoch=True, prog_bar=True, batch_size=1, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the mean of the epoch for the result."""
        if "val_dice" in self.trainer.callback_metrics:
            self.validation_dice.append(float(self.trainer.callback_metrics["val_dice"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description that makes the checkpoint enough to export and deploy."""
        checkpoint[DESCRIPTION] = self.description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the schedule's length of the options, so that a finished run can go on for more epochs."""
        for state in checkpoint["lr_schedulers"]:
            for name in ("total_steps", "_schedule_phases"):
                state.pop(name, None)


def dice_per_class(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """2 |P and T| / (|P| + |T|) of every foreground class, NaN where both are empty.

    Args:
        prediction: integer labels of any shape.
        truth: integer labels of the same shape.
        classes: K with the background.

    Returns:
        (K - 1,) float64 on the device of `prediction`.
    """
    pairs = torch.bincount((truth.long() * classes + prediction.long()).flatten(), minlength=classes**2)
    table = pairs.reshape(classes, classes).double()
    return (2 * table.diagonal() / (table.sum(0) + table.sum(1)))[1:]


def window_transform(options: TrainingOptions) -> Any:
    """A random window of a case, every class as often in its middle, varied in intensity and a little in shape.

    No flips and no large turns: in the body left is not right, and a mirrored liver is a wrong label.
    """
    keys, classes = ("image", "label"), len(options.label_map.names)
    steps = [
        transforms.RandCropByLabelClassesd(
            keys, "label", options.window, [1] * classes, classes, indices_key="centres", warn=False
        ),
        transforms.SelectItemsd(keys),
        transforms.RandAffined(
            keys,
            prob=0.2,
            rotate_range=(0.1, 0.1, 0.1),
            scale_range=(0.1, 0.1, 0.1),
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        transforms.RandScaleIntensityd("image", factors=0.1, prob=0.5),
        transforms.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        transforms.RandGaussianNoised("image", prob=0.3, std=0.03),
        transforms.EnsureTyped(keys, track_meta=False),
    ]
    return transforms.Compose(steps)


def _fields(case: TrainingCase) -> dict[str, Any]:
    return {"image": case.image, "label": case.classes, "centres": case.centres}
