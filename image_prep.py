"""The seed's `python image_prep.py --output_path calib.npy --data_path ... --label_path ...`, over `ptq3d calibrate`."""

import sys
from pathlib import Path

import tyro

from ptq3d.cli import run
from ptq3d.options import CalibrateOptions


def main(
    output_path: Path, data_path: Path, label_path: Path | None = None, num_samples: int = 20, seed: int = 0
) -> int:
    """Draw 20 windows of 96^3 voxels from BTCV volumes into a .npy file.

    Args:
        output_path: the .npy or .npz file to write.
        data_path: folder of images; use training images, a warning names test images.
        label_path: folder of label maps: windows are centred on organs.
        num_samples: windows to draw.
        seed: equal seeds draw equal windows.
    """
    return run(
        CalibrateOptions(
            data=data_path, labels=label_path, output=output_path, preprocessing="btcv", number=num_samples, seed=seed
        )
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
