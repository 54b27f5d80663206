"""The seed's `python deploy.py --onnx_path ... --data_path ... --label_path ... --net unet --compute_dice`, over `ptq3d deploy`."""

import sys
from pathlib import Path

import tyro

from ptq3d.cli import run
from ptq3d.options import DeployOptions


def main(
    onnx_path: Path,
    data_path: Path,
    label_path: Path | None = None,
    net: str = "unet",
    compute_dice: bool = False,
    output_dir: Path | None = None,
    engine: str = "auto",
    preprocessing: str | None = None,
) -> int:
    """Segment a folder of volumes.

    Args:
        onnx_path: FP32 or INT8 (Q/DQ) ONNX file, ours or ModelOpt's.
        data_path: folder of images.
        label_path: folder of label maps.
        net: unet or transunet; a file without a manifest is prepared as the seed prepares BTCV for them.
        compute_dice: print Dice per class; needs --label_path.
        output_dir: for the label maps; default: segmentations-<model>.
        engine: openvino, onnxruntime, torch, reference or auto.
        preprocessing: a preset or a TOML / JSON file, for a file without a manifest.
    """
    if compute_dice and label_path is None:
        sys.stderr.write("--compute_dice needs --label_path.\n")
        return 2
    labels = label_path if compute_dice else None
    return run(
        DeployOptions(
            model=onnx_path,
            data=data_path,
            labels=labels,
            output=output_dir,
            engine=engine,
            preprocessing=preprocessing,
            net=net,
        )
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
