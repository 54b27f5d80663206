"""What nnU-Net's plans.json and dataset.json say of a configuration: network, window, preprocessing, labels.

Whatever is asked for there and cannot be done exactly here is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ptq3d.errors import OptionError, ShapeError
from ptq3d.models.nnunet import Layout, Sizes
from ptq3d.volumes.intensity import Rule
from ptq3d.volumes.preprocessing import Preprocessing

Table = Mapping[str, Any]
PACKAGE = "dynamic_network_architectures."
NETWORKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
NORMS = {"InstanceNorm3d": nn.InstanceNorm3d, "BatchNorm3d": nn.BatchNorm3d}
ACTIVATIONS = {"LeakyReLU": nn.LeakyReLU, "ReLU": nn.ReLU}
CONVOLUTIONS = {"Conv3d": nn.Conv3d}
NOT_IN_INFERENCE = ("deep_supervision", "dropout_op", "dropout_op_kwargs")
LARGEST_WIDTH = 320  # of old plans that do not say theirs
SMALLEST_DEVIATION = 1e-8  # nnU-Net's, for an image of one value

READERS = {"SimpleITKIO": None, "NibabelIO": None, "SimpleITKIOWithReorient": "RAS", "NibabelIOWithReorient": "RAS"}
"""Readers of volumes -> the orientation they turn them to; all hand them on with their axes reversed."""

CANONICAL = ("TotalSegmentator", "TotalSegMRI")
"""Parts of the names of data sets whose files were turned to RAS before nnU-Net saw them, which no plan says.

A file stored otherwise would be segmented mirrored: left kidneys called right. Source: TotalSegmentator, as_closest_canonical.
"""

RESAMPLING = "resample_data_or_seg_to_shape"
RESAMPLING_NUMBERS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


def find_configuration(plans: Table, name: str) -> dict[str, Any]:
    """The entries of a configuration with those it inherits.

    Raises:
        OptionError: there is no such configuration, it inherits from itself, or it is no 3D network that works alone.
    """
    configurations: Table = plans["configurations"]
    chain: list[str] = []
    following: str | None = name
    while following is not None:
        if following not in configurations or following in chain:
            there = ", ".join(sorted(configurations))
            raise OptionError(f"there is no configuration '{following}' that ends its inheritance. There are: {there}.")
        chain.append(following)
        following = configurations[following].get("inherits_from")
    found = {key: value for link in reversed(chain) for key, value in configurations[link].items()}
    if len(found["patch_size"]) != 3:
        raise OptionError(f"configuration '{name}' is a 2D network; only 3D ones can be exported. Name a 3d_ one.")
    if found.get("previous_stage"):
        raise OptionError(
            f"configuration '{name}' refines the labels of '{found['previous_stage']}', a cascade: its network takes labels "
            "beside the image, which a deployed engine does not have. Name 3d_fullres or 3d_lowres."
        )
    return found


def layout_of(configuration: Table, *, in_channels: int, num_classes: int) -> Layout:
    """The network of a configuration, in the plans' present or former format.

    Raises:
        OptionError: a network, layer or option that is not known here.
    """
    architecture: Table = configuration.get("architecture") or _former_architecture(configuration)
    network, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    kind = network.rsplit(".", 1)[-1]
    if kind not in NETWORKS or not network.startswith(PACKAGE):
        raise OptionError(f"the network is {network}; known here are {', '.join(NETWORKS)} of {PACKAGE[:-1]}.")
    stages = int(kwargs["n_stages"])
    _layer(kwargs["conv_op"], CONVOLUTIONS, {})
    layout = Layout(
        in_channels,
        num_classes,
        features=_per_stage(kwargs["features_per_stage"], stages),
        kernels=tuple(_sizes(kernel) for kernel in _each(kwargs["kernel_sizes"], stages)),
        strides=tuple(_sizes(stride) for stride in _each(kwargs["strides"], stages)),
        encoder=_per_stage(kwargs[NETWORKS[kind]], stages),
        decoder=_per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1),
        residual=kind == "ResidualEncoderUNet",
        conv_bias=bool(kwargs.get("conv_bias", False)),
        norm=_layer(kwargs.get("norm_op"), NORMS, kwargs.get("norm_op_kwargs")),
        activation=_layer(kwargs.get("nonlin"), ACTIVATIONS, kwargs.get("nonlin_kwargs")),
        activation_first=bool(kwargs.get("nonlin_first", False)),
    )
    _require_known(kwargs, kind)
    return layout


KNOWN = (
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage_decoder", "conv_bias",
    "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "nonlin_first", *NOT_IN_INFERENCE,
)  # fmt: skip


def _require_known(kwargs: Table, kind: str) -> None:
    unknown = [
        key for key, value in kwargs.items() if key not in (*KNOWN, NETWORKS[kind]) and value not in (None, False)
    ]
    if unknown:
        raise OptionError(
            f"{kind} with {unknown[0]}={kwargs[unknown[0]]!r} is not known here; only its standard form is."
        )


def _former_architecture(configuration: Table) -> Table:
    """Plans before version 2.4 of nnU-Net name sizes only; widths double from stage to stage up to a largest one."""
    kind, counts = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
    base, most = configuration["UNet_base_num_features"], configuration.get("unet_max_num_features", LARGEST_WIDTH)
    return {
        "network_class_name": f"{PACKAGE}architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": len(counts),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(counts))],
            "conv_op": "torch.nn.Conv3d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            NETWORKS.get(kind, "blocks"): counts,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": "torch.nn.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }


def _layer(name: str | None, table: Mapping[str, type[nn.Module]], kwargs: Table | None) -> Callable[..., nn.Module]:
    if name is None or not name.startswith("torch.nn.") or name.rsplit(".", 1)[-1] not in table:
        raise OptionError(f"the network has a layer {name}; known here are {', '.join(table)} of torch.nn.")
    return partial(table[name.rsplit(".", 1)[-1]], **(kwargs or {}))


def _each(value: Any, number: int) -> Sequence[Any]:
    return [value] * number if isinstance(value, int) else value


def _per_stage(value: Any, number: int) -> tuple[int, ...]:
    return tuple(int(one) for one in _each(value, number))


def _sizes(value: Any) -> Sizes:
    x, y, z = _per_stage(value, 3)
    return x, y, z


def window_of(configuration: Table, layout: Layout) -> Sizes:
    """The window that a network was trained with, along the axes it sees.

    Raises:
        ShapeError: see `require_window`.
    """
    window = _sizes(configuration["patch_size"])
    require_window(window, layout.stride)
    return window


def require_window(window: Sizes, stride: Sizes) -> None:
    """Refuse a window that a network cannot halve at each of its stages.

    Raises:
        ShapeError: a side is no positive multiple of the stride along it; the message has the next larger sizes.
    """
    if all(side > 0 and side % step == 0 for side, step in zip(window, stride, strict=True)):
        return
    fitting = [max(-(-side // step), 1) * step for side, step in zip(window, stride, strict=True)]
    given, steps, example = ("x".join(map(str, sizes)) for sizes in (window, stride, fitting))
    raise ShapeError(f"the sides of a window must be multiples of {steps}, got {given}. Take for example {example}.")


def preprocessing_of(plans: Table, configuration: Table, *, channels: int) -> Preprocessing:
    """What images go through in nnU-Net before the network.

    Raises:
        OptionError: a reader, preprocessor, resampling or normalisation that is not known here.
    """
    reader = plans["image_reader_writer"]
    if reader not in READERS:
        raise OptionError(f"volumes were read by {reader}; known here are {', '.join(READERS)}.")
    _require_default(configuration)
    reversed_axes = _sizes([2 - int(axis) for axis in plans["transpose_forward"]])
    canonical = any(part in plans.get("dataset_name", "") for part in CANONICAL)
    letters, (x, y, z) = "RAS" if canonical else READERS[reader], map(float, configuration["spacing"])
    return Preprocessing(
        orientation=None if letters is None else "".join(letters[axis] for axis in reversed_axes),
        spacing=(x, y, z),
        intensity=_intensity(plans, configuration, channels),
        intensity_first=True,
        axes=reversed_axes if letters is None else None,
        resampling="nnunet",
        crop="nonzero",
    )


def _require_default(configuration: Table) -> None:
    preprocessor = configuration.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise OptionError(f"images were prepared by {preprocessor}; known here is only DefaultPreprocessor.")
    function, numbers = configuration["resampling_fn_data"], configuration["resampling_fn_data_kwargs"]
    if function != RESAMPLING or {**RESAMPLING_NUMBERS, "force_separate_z": False, **numbers} != RESAMPLING_NUMBERS:
        raise OptionError(
            f"images were resampled by {function} with {dict(numbers)}; known here is only {RESAMPLING} "
            f"with {RESAMPLING_NUMBERS}."
        )


def _intensity(plans: Table, configuration: Table, channels: int) -> tuple[Rule, ...]:
    schemes, masks = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    former = "foreground_intensity_properties_by_modality"
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(former) or {}
    if len(schemes) != channels:
        raise OptionError(f"the plans normalise {len(schemes)} channels, the data set names {channels}.")
    rules: list[Rule] = []
    for channel, (scheme, mask) in enumerate(zip(schemes, masks, strict=True)):
        if scheme not in SCHEMES:
            raise OptionError(f"channel {channel} is normalised by {scheme}; known here are {', '.join(SCHEMES)}.")
        found = SCHEMES[scheme](properties.get(str(channel), {}), bool(mask))
        rules += [{**rule, "channel": channel} if channels > 1 else rule for rule in found]
    return tuple(rules)


def _ct(properties: Table, mask: bool) -> list[Rule]:
    low, high = float(properties["percentile_00_5"]), float(properties["percentile_99_5"])
    deviation = max(float(properties["std"]), SMALLEST_DEVIATION)
    standardize = {"rule": "standardize", "mean": float(properties["mean"]), "deviation": deviation}
    return [{"rule": "clip", "low": low, "high": high}, standardize]


def _z_score(properties: Table, mask: bool) -> list[Rule]:
    return [{"rule": "masked_z_score" if mask else "z_score"}]


SCHEMES: dict[str, Callable[[Table, bool], list[Rule]]] = {
    "CTNormalization": _ct,
    "ZScoreNormalization": _z_score,
    "RescaleTo01Normalization": lambda _properties, _mask: [{"rule": "range"}],
    "RGBTo01Normalization": lambda _properties, _mask: [{"rule": "standardize", "mean": 0.0, "deviation": 255.0}],
    "NoNormalization": lambda _properties, _mask: [],
}
"""Normalisations by name: (properties of the training images' foreground, use the mask) -> rules."""


def labels_of(dataset: Table) -> tuple[str, ...]:
    """Names of the classes in the order of the network's outputs, the background first.

    Raises:
        OptionError: regions, or labels other than 0, 1, 2, ...
    """
    values = {str(name): value for name, value in dataset["labels"].items() if name != "ignore"}
    regions = [name for name, value in values.items() if isinstance(value, list) and len(value) > 1]
    if regions:
        raise OptionError(
            f"'{regions[0]}' is a region of several labels: such a network decides for each region by itself, with a "
            "threshold, and regions overlap. Labels here are the largest of all outputs, which is another answer. "
            "Train on labels that exclude one another to deploy them here."
        )
    names = {int(value[0] if isinstance(value, list) else value): name for name, value in values.items()}
    if sorted(names) != list(range(len(values))):
        raise OptionError(f"labels must be 0, 1, 2, ... without gaps, got {sorted(names)}.")
    return tuple(names[label] for label in sorted(names))


def channels_of(dataset: Table) -> int:
    """Channels of an image."""
    return len(dataset.get("channel_names") or dataset["modality"])
