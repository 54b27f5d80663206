"""Folders of results as nnU-Net v2 writes them, small; and the real libraries, where they are installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REASON = "the real nnU-Net is not installed; `make install` brings it"
CONFIGURATION = "3d_fullres"
FOLDER = f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
PROPERTIES = {
    "max": 900.0, "mean": 71.3, "median": 60.0, "min": -500.0, "percentile_00_5": -120.0, "percentile_99_5": 310.0, "std": 88.1,
}  # fmt: skip
ISOTROPIC = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 12],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
}
COMMON = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
RESAMPLING = "resample_data_or_seg_to_shape"
FORMER = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2, 2],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3]] * 3,
}


def library(name: str) -> Any:
    """A module of the real libraries; the test is skipped where they are missing."""
    return pytest.importorskip(name, reason=REASON)


def architecture(name: str = "PlainConvUNet", **changes: Any) -> dict[str, Any]:
    """The network's entry in plans, of the present format."""
    kwargs = {**COMMON, **deepcopy(ISOTROPIC), **changes}
    if name == "ResidualEncoderUNet":
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configured(**changes: Any) -> dict[str, Any]:
    """A configuration of plans."""
    data, labels = (
        {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    )
    return {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [30.0, 30.0, 30.0],
        "spacing": [1.5, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_data_kwargs": data,
        "resampling_fn_seg_kwargs": labels,
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_probabilities_kwargs": {**data, "order": 1},
        "batch_dice": True,
        "architecture": architecture(),
        **changes,
    }


def planned(configuration: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What plans.json holds, with one configuration."""
    chosen = configured() if configuration is None else dict(configuration)
    channels = len(chosen["normalization_schemes"])
    return {
        "dataset_name": "Dataset999_Made",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [40, 40, 40],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: chosen},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(index): PROPERTIES for index in range(channels)},
        **changes,
    }


def described(names: Sequence[str] = ("background", "liver", "spleen"), channels: int = 1) -> dict[str, Any]:
    """What dataset.json holds."""
    return {
        "channel_names": {str(index): "CT" for index in range(channels)},
        "labels": {name: index for index, name in enumerate(names)},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }


def checkpoint_of(state: Mapping[str, torch.Tensor], plans: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A checkpoint with the entries that nnU-Net's trainer writes, NumPy numbers among them."""
    losses = [np.float64(0.3), np.float32(0.25)]
    return {
        "network_weights": state,
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"train_losses": losses, "dice_per_class_or_region": [losses], "epoch_end_timestamps": [1.5]},
        "_best_ema": np.float64(0.8),
        "current_epoch": 1000,
        "init_args": {
            "plans": dict(plans),
            "configuration": CONFIGURATION,
            "fold": 0,
            "dataset_json": described(),
            "device": torch.device("cuda:0"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }


def write_results(
    parent: Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    plans: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A folder of results with a checkpoint of each fold; `changes` go into the checkpoints."""
    folder, plans = parent / FOLDER, planned() if plans is None else plans
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(described() if dataset is None else dataset))
    for fold, state in states.items():
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint_of(state, plans, **changes), folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def real_network(architecture: Mapping[str, Any], *, channels: int = 1, classes: int = 3) -> torch.nn.Module:
    """The real network that plans ask for, with weights and statistics that differ everywhere, in evaluation mode."""
    built = library("nnunetv2.utilities.get_network_from_plans").get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        allow_init=True,
        deep_supervision=False,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value += (noise.abs() if "running_var" in name else noise) * 0.1
    network: torch.nn.Module = built.eval()
    return network
