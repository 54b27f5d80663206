"""The seed's `python train.py --model unet3d --data_path ... --label_path ... --output_dir ...`, over `ptq3d train`."""

import sys
from pathlib import Path

import tyro

from ptq3d.cli import run
from ptq3d.options import TrainOptions


def main(
    model: str,
    data_path: Path,
    label_path: Path,
    output_dir: Path | None = None,
    batch_size: int = 2,
    num_epochs: int = 460,
    num_classes: int = 14,
    seed: int = 0,
) -> int:
    """Train U-Net or TransUNet on a folder in BTCV layout; also writes checkpoint_epoch_<num_epochs>.pth.

    Args:
        model: unet3d or transunet.
        data_path: folder of images.
        label_path: folder of label maps.
        output_dir: for checkpoints and logs; default: output_<network>.
        batch_size: windows a step.
        num_epochs: passes over the training cases.
        num_classes: classes with background.
        seed: equal seeds give equal runs.
    """
    output = output_dir or Path(f"output_{model.removesuffix('3d')}")
    return run(
        TrainOptions(
            model=model, data=data_path, labels=label_path, output_dir=output, batch_size=batch_size,
            num_epochs=num_epochs, num_classes=num_classes, seed=seed, seed_checkpoint=True,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
