"""The seed's `python export.py --onnx_file_name ... --net unet --pretrained_weights_path ...`, over `ptq3d export`."""

import sys
from pathlib import Path

import tyro

from ptq3d.cli import run
from ptq3d.options import ExportOptions


def main(onnx_file_name: Path, net: str, pretrained_weights_path: Path) -> int:
    """Turn a checkpoint into an FP32 ONNX file.

    Args:
        onnx_file_name: the file to write.
        net: unet or transunet.
        pretrained_weights_path: a checkpoint of `train.py`, of the seed, or a state dict.
    """
    return run(ExportOptions(checkpoint=pretrained_weights_path, output=onnx_file_name, net=net))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
