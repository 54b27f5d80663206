"""MONAI bundles as MONAI itself writes them, around small networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, init_bundle
from monai.networks import nets

WINDOW = [16, 24, 16]
CLASSES = {"0": "background", "1": "organ", "2": "lesion"}
UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
LOADING = [{"_target_": "LoadImaged", "keys": "@image_key"}, {"_target_": "EnsureChannelFirstd", "keys": "@image_key"}]
RAS = {
    "_target_": "Orientationd",
    "keys": "@image_key",
    "axcodes": "RAS",
    "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
}
SPACING = {"_target_": "Spacingd", "keys": "@image_key", "pixdim": "@pixdim", "mode": "bilinear"}
CT = {
    "_target_": "ScaleIntensityRanged",
    "keys": "@image_key",
    "a_min": -57,
    "a_max": 164,
    "b_min": 0,
    "b_max": 1,
    "clip": True,
}
TYPED = {"_target_": "EnsureTyped", "keys": "@image_key", "device": "@device"}
INFERER = {
    "_target_": "SlidingWindowInferer",
    "roi_size": WINDOW,
    "sw_batch_size": "@sizes#batch",
    "overlap": "@sizes#overlap",
    "mode": "gaussian",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
}


def network(definition: dict[str, Any] = UNET, seed: int = 0) -> torch.nn.Module:
    """The network of a definition, with BatchNormalization that has seen something."""
    torch.manual_seed(seed)
    kind = getattr(nets, definition["_target_"].rpartition(".")[2])
    made: torch.nn.Module = kind(**{key: value for key, value in definition.items() if key != "_target_"})
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made.eval()


def inference(transforms: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """An inference configuration as in MONAI's model zoo; None leaves an item out."""
    steps = [*LOADING, RAS, SPACING, CT, TYPED] if transforms is None else transforms
    content = {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$list(sorted(glob.glob(@bundle_root + '/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "sizes": {"fine": True, "overlap": 0.25, "batch": 4},
        "pixdim": "$[1.5, 1.5, 2.0] if @sizes#fine else [3.0, 3.0, 3.0]",
        "network_def": UNET,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": steps},
        "inferer": INFERER,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "@image_key"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def write_bundle(
    folder: Path,
    content: dict[str, Any] | None = None,
    made: torch.nn.Module | None = None,
    *,
    kind: str = "json",
    classes: dict[str, str] | None = CLASSES,
    channels: int = 1,
) -> Path:
    """A bundle folder by MONAI's own writers."""
    content = inference() if content is None else content
    outputs = {"pred": {"type": "image", "format": "segmentation", "channel_def": classes}} if classes else {}
    data = {"inputs": {"image": {"num_channels": channels, "spatial_shape": WINDOW}}, "outputs": outputs}
    metadata = {"version": "0.0.1", "task": "a test", "network_data_format": data}
    init_bundle(folder, network=network() if made is None else made, metadata_str=metadata, inference_str=content)
    if kind != "json":
        (folder / "configs/inference.json").unlink()
        plain = json.loads(json.dumps(content))
        ConfigParser.export_config_file(plain, folder / f"configs/inference.{kind}", fmt="yaml")
    return folder


def write_image(path: Path, shape: tuple[int, int, int] = (21, 26, 19), *, oblique: bool = True, seed: int = 0) -> Path:
    """A CT-like volume of integers, oblique and left-handed, without a zero but in one corner."""
    random = np.random.default_rng(seed).normal(size=shape)
    for axis in range(3):
        random = random + np.roll(random, 1, axis) + np.roll(random, 2, axis)
    data = np.round(random / random.std() * 150 + 60)
    data[data == 0] = 1
    data[:4, :3, :5] = 0
    affine = np.diag([-1.7, 2.1, 2.4, 1.0])
    if oblique:
        turn = np.array([[0.98, -0.17, 0.05], [0.17, 0.98, 0.02], [-0.05, -0.01, 1.0]])
        affine[:3, :3] = np.linalg.qr(turn)[0] @ affine[:3, :3]
    affine[:3, 3] = [10.0, -20.0, 5.0]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), path)
    return path
