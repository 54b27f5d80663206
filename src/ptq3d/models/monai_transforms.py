"""MONAI's dictionary transforms as one `Preprocessing`: those that mean the same here, an error that names any other.

A new transform is one function `(draft, step) -> draft` and one line in `TRANSFORMS`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ptq3d.errors import OptionError
from ptq3d.models.bundle_config import Config
from ptq3d.volumes.intensity import Rule
from ptq3d.volumes.preprocessing import Preprocessing

log = logging.getLogger("ptq3d")
PREPROCESSING = "preprocessing"
EVERYWHERE = ("_target_", "_desc_", "_disabled_", "keys", "allow_missing_keys", "dtype", "lazy")
COMPOSE = ("_target_", "_desc_", "transforms", "map_items", "unpack_items", "log_stats")
STATISTICS = ("quantiles", "z_score", "range")  # rules that look at all voxels
FLOATS = re.compile(r"(\$(torch|np|numpy)\.)?(float32|float64|float|double)")
RAS_LABELS = (None, [["L", "R"], ["P", "A"], ["I", "S"]])
CHANNEL_PLACES = (None, -1, 3, "no_channel")  # of a volume file's array


@dataclass(frozen=True)
class Step:
    """One transform of a bundle's list.

    Attributes:
        name: of its class, "Spacingd".
        where: its id, "preprocessing::transforms::3".
        position: in the list, from 1.
        arguments: by name, as written.
        config: what they refer to.
        place: of the image among its keys.
        in_channels: of the image.
    """

    name: str
    where: str
    position: int
    arguments: Mapping[str, Any]
    config: Config
    place: int
    in_channels: int

    def get(self, argument: str, default: Any = None) -> Any:
        """The value of an argument; where it is a list with one value a key, that of the image."""
        value = self.config.plain(self.arguments.get(argument, default), f"{self.where}::{argument}")
        per_key = isinstance(value, list) and argument in ("mode", "padding_mode", "align_corners", "scale_extent")
        return value[self.place] if per_key and self.place < len(value) else value

    def number(self, argument: str, default: float | None = None) -> float:
        """An argument that must be a finite number."""
        value = self.get(argument, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(f"has '{argument}' {value!r}, where a number is wanted")
        return float(value)

    def flag(self, argument: str) -> bool:
        """An argument that is true or false, as MONAI takes it: "True" is true."""
        value = self.get(argument, False)
        if isinstance(value, str) and value.lower() != "true":
            raise self.refused(f"has '{argument}' '{value}', a text, which MONAI takes for true")
        return bool(value)

    def require(self, argument: str, default: Any, allowed: tuple[Any, ...]) -> None:
        """Refuse an argument that has no meaning here but at one of the values allowed."""
        value = self.get(argument, default)
        if value not in allowed:
            raise self.refused(f"has '{argument}' {value!r}, where ptq3d does what {allowed[-1]!r} does")

    def refused(self, why: str) -> OptionError:
        """The error that says where the transform is and how to go on without it."""
        return OptionError(
            f"{self.config.path}: transform {self.position} of '{PREPROCESSING}', {self.name}, {why}. "
            "Say what happens to images in a file of your own: --preprocessing FILE."
        )


@dataclass(frozen=True)
class Draft:
    """A `Preprocessing` on its way, and what stands where: intensity rules before and behind Spacingd, a crop left out."""

    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    before: tuple[Rule, ...] = ()
    behind: tuple[Rule, ...] = ()
    crop: Step | None = None

    def having(self, step: Step, *rules: Rule) -> Draft:
        """The draft with the intensity rules of a step."""
        if self.crop is not None and any(rule["rule"] in STATISTICS for rule in rules):
            raise step.refused(f"looks at all voxels that {self.crop.name} leaves, and ptq3d does not crop")
        if self.spacing is None:
            return replace(self, before=self.before + rules)
        if self.before:
            raise step.refused("changes intensities behind Spacingd, others stand before it; ptq3d does all at once")
        return replace(self, behind=self.behind + rules)


def preprocessing_of(config: Config, *, in_channels: int) -> Preprocessing:
    """What a bundle's list of transforms does to its images.

    Args:
        config: with an item `preprocessing`, a Compose or a list.
        in_channels: of the image.

    Raises:
        OptionError: no such item; a transform, an argument or an order that cannot be said here, by name and position.
        CheckpointError: a value that needs code.

    Source: equal to MONAI's own transforms within 1e-4.
    """
    draft = Draft()
    for step in _steps(config, in_channels):
        draft = _transform(step).apply(draft, step)
    if draft.crop is not None:
        log.warning(
            "%s: %s is left out: whole volumes are segmented. To segment the box of the foreground only, ptq3d deploy --crop foreground.",
            config.path,
            draft.crop.name,
        )
    first = draft.spacing is not None and bool(draft.before)
    return Preprocessing(draft.orientation, draft.spacing, draft.before + draft.behind, first)


def transforms_in(config: Config, name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(class, id, arguments as written) of every transform in a Compose or list, one after the other.

    Raises:
        OptionError: it is neither, or an entry is no transform.
    """
    yield from _listed(config, config.item(name), name)


def _listed(config: Config, item: Any, where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if isinstance(item, list):
        for index, part in enumerate(item):
            place = f"{where}::{index}"
            yield from _listed(config, config.follow(part, place), place)
        return
    if not isinstance(item, dict) or not isinstance(item.get("_target_"), str):
        raise OptionError(
            f"{config.path}: '{where}' is no list of transforms. Write one there. What happens to images can also be said by "
            "--preprocessing FILE."
        )
    name = _class_name(item["_target_"])
    if name != "Compose":
        yield name, where, item
        return
    for argument in sorted(set(item) - set(COMPOSE)):
        if config.plain(item[argument], f"{where}::{argument}") not in (None, False):
            raise OptionError(f"{config.path}: '{where}::{argument}' of a Compose is not read. Leave it out.")
    inside = f"{where}::transforms"
    yield from _listed(config, config.follow(item.get("transforms"), inside), inside)


def _class_name(target: str) -> str:
    """Spacingd for monai.transforms.Spacingd, SpacingD and SpacingDict; a name of other code stays whole."""
    package, _, name = target.rpartition(".")
    if package and not package.startswith("monai.transforms"):
        return target
    return re.sub(r"(?<=[a-z])(D|Dict)$", "d", name)


def _steps(config: Config, in_channels: int) -> Iterator[Step]:
    """The transforms that concern the image."""
    image: str | None = None
    for position, (name, where, arguments) in enumerate(transforms_in(config, PREPROCESSING), 1):
        step = Step(name, where, position, arguments, config, 0, in_channels)
        keys = step.get("keys")
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(keys, list) or not keys:
            _transform(step)
            raise step.refused(f"has 'keys' {keys!r}, where the names of images are wanted")
        image = image or ("image" if "image" in keys else str(keys[0]))
        if image in keys and not step.flag("_disabled_"):
            yield replace(step, place=keys.index(image))


def _nothing(draft: Draft, step: Step) -> Draft:
    return draft


def _channel_first(draft: Draft, step: Step) -> Draft:
    step.require("channel_dim", None, CHANNEL_PLACES)
    return draft


def _orientation(draft: Draft, step: Step) -> Draft:
    if draft.spacing is not None:
        raise step.refused("turns axes behind Spacingd, whose 'pixdim' is then of other axes; ptq3d turns first")
    if step.get("labels") not in RAS_LABELS:
        raise step.refused("names axes by 'labels' of its own")
    axes = "RAS" if step.flag("as_closest_canonical") else step.get("axcodes")
    if not isinstance(axes, str):
        raise step.refused(f"has 'axcodes' {axes!r}, where a text such as RAS is wanted")
    return replace(draft, orientation=axes)


def _spacing(draft: Draft, step: Step) -> Draft:
    if draft.spacing is not None:
        raise step.refused("resamples a second time")
    if draft.crop is not None:
        raise step.refused(f"resamples what {draft.crop.name} leaves, and ptq3d does not crop")
    step.require("mode", "bilinear", (1, "bilinear"))
    step.require("padding_mode", "border", ("border",))
    step.require(
        "align_corners", False, (True, False)
    )  # makes no difference to voxels inside, MONAI's grid is the same
    for argument in ("diagonal", "recompute_affine", "scale_extent"):
        step.require(argument, False, (False,))
    for argument in ("min_pixdim", "max_pixdim"):
        step.require(argument, None, (None,))
    sizes = step.get("pixdim")
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(isinstance(s, int | float) and s > 0 for s in sizes):
        raise step.refused(f"has 'pixdim' {sizes!r}, where three sizes in mm are wanted")
    return replace(draft, spacing=(float(sizes[0]), float(sizes[1]), float(sizes[2])))


def _crop(draft: Draft, step: Step) -> Draft:
    """Left out: safe where nothing behind it depends on what was cut, which `Draft.having` and `_spacing` see to."""
    return replace(draft, crop=step)


def _range(draft: Draft, step: Step) -> Draft:
    low, high = step.number("a_min"), step.number("a_max")
    clipped, (bottom, top) = step.flag("clip"), _target(step, "b_min", "b_max", None)
    if not low < high:
        raise step.refused(f"has 'a_min' {low}, which is not below 'a_max' {high}")
    if clipped and step.get("b_min") is None:
        raise step.refused("clips to a range that it does not name")
    if clipped:
        return draft.having(step, {"rule": "window", "low": low, "high": high}, *_onto(bottom, top))
    deviation = (high - low) / (top - bottom)
    return draft.having(step, _standardize(low - bottom * deviation, deviation))


def _percentiles(draft: Draft, step: Step) -> Draft:
    _require_one_channel(step)
    step.require("relative", False, (False,))
    if not step.flag("clip") or step.get("b_min") is None:
        raise step.refused("does not clip what lies outside of the percentiles, and ptq3d's rule 'quantiles' does")
    rule = {"rule": "quantiles", "lower": step.number("lower") / 100, "upper": step.number("upper") / 100}
    return draft.having(step, rule, *_onto(*_target(step, "b_min", "b_max", None)))


def _whole_range(draft: Draft, step: Step) -> Draft:
    _require_one_channel(step)
    if step.get("minv", 0.0) is None and step.get("maxv", 1.0) is None:
        factor = 1 + step.number("factor", 0.0)
        if not factor > 0:
            raise step.refused(f"has 'factor' {factor - 1}, which turns dark to bright")
        return draft.having(step, _standardize(0.0, 1 / factor))
    return draft.having(step, {"rule": "range"}, *_onto(*_target(step, "minv", "maxv", (0.0, 1.0))))


def _normalize(draft: Draft, step: Step) -> Draft:
    _require_one_channel(step)
    mean, deviation = step.get("subtrahend"), step.get("divisor")
    if mean is None and deviation is None:
        return draft.having(step, {"rule": "z_score", "nonzero": step.flag("nonzero")})
    if mean is None or deviation is None or step.flag("nonzero"):
        raise step.refused("takes one of 'subtrahend' and 'divisor' from the image, or leaves zeros as they are")
    mean, deviation = (
        value[0] if isinstance(value, list) and len(value) == 1 else value for value in (mean, deviation)
    )
    if not all(isinstance(value, int | float) for value in (mean, deviation)) or not deviation > 0:
        raise step.refused(f"has 'subtrahend' {mean!r} and 'divisor' {deviation!r}, where numbers are wanted")
    return draft.having(step, _standardize(mean, deviation))


def _require_one_channel(step: Step) -> None:
    if step.in_channels > 1 and step.flag("channel_wise"):
        raise step.refused(f"treats each of {step.in_channels} channels by itself, ptq3d's rules take all together")


def _target(step: Step, low: str, high: str, default: tuple[float, float] | None) -> tuple[float, float]:
    """Where a range is put, by the names of its ends; 0..1 where neither is given."""
    if default is None and step.get(low) is None and step.get(high) is None:
        return 0.0, 1.0
    bottom, top = (step.number(name, value) for name, value in zip((low, high), default or (None, None), strict=True))
    if not bottom < top:
        raise step.refused(f"has '{low}' {bottom}, which is not below '{high}' {top}")
    return bottom, top


def _onto(bottom: float, top: float) -> tuple[Rule, ...]:
    """0..1 onto bottom..top: top - bottom times x, plus bottom."""
    width = top - bottom
    return () if (bottom, width) == (0.0, 1.0) else (_standardize(-bottom / width, 1 / width),)


def _standardize(mean: float, deviation: float) -> Rule:
    return {"rule": "standardize", "mean": mean, "deviation": deviation}


@dataclass(frozen=True)
class Transform:
    """How a transform is read.

    Attributes:
        apply: what it makes of the draft.
        reads: the arguments that it reads.
        ignores: the arguments that say nothing of the voxels here; they are not even looked at.
    """

    apply: Callable[[Draft, Step], Draft]
    reads: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()


LOADING = ("reader", "meta_keys", "meta_key_postfix", "overwriting", "image_only", "ensure_channel_first", "simple_keys",
           "prune_meta_pattern", "prune_meta_sep", "expanduser")  # fmt: skip
TENSORS = ("device", "wrap_sequence", "track_meta", "data_type", "non_blocking")
RESAMPLING = ("pixdim", "mode", "padding_mode", "diagonal", "recompute_affine", "scale_extent", "align_corners",
              "min_pixdim", "max_pixdim")  # fmt: skip
CROPPING = ("source_key", "select_fn", "channel_indices", "margin", "allow_smaller", "k_divisible", "mode",
            "start_coord_key", "end_coord_key")  # fmt: skip
TRANSFORMS: Mapping[str, Transform] = {
    "CastToTyped": Transform(_nothing),
    "CropForegroundd": Transform(_crop, ignores=CROPPING),
    "EnsureChannelFirstd": Transform(_channel_first, reads=("channel_dim",), ignores=("strict_check",)),
    "EnsureTyped": Transform(_nothing, ignores=TENSORS),
    "Identityd": Transform(_nothing),
    "LoadImaged": Transform(_nothing, ignores=LOADING),
    "NormalizeIntensityd": Transform(_normalize, reads=("subtrahend", "divisor", "nonzero", "channel_wise")),
    "Orientationd": Transform(_orientation, reads=("axcodes", "as_closest_canonical", "labels")),
    "ScaleIntensityRangePercentilesd": Transform(
        _percentiles, reads=("lower", "upper", "b_min", "b_max", "clip", "relative", "channel_wise")
    ),
    "ScaleIntensityRanged": Transform(_range, reads=("a_min", "a_max", "b_min", "b_max", "clip")),
    "ScaleIntensityd": Transform(_whole_range, reads=("minv", "maxv", "factor", "channel_wise")),
    "Spacingd": Transform(_spacing, reads=RESAMPLING, ignores=("ensure_same_shape",)),
    "ToDeviced": Transform(_nothing, ignores=TENSORS),
    "ToTensord": Transform(_nothing, ignores=TENSORS),
}


def _transform(step: Step) -> Transform:
    """The line of the table, once the arguments that it does not know were refused."""
    known = TRANSFORMS.get(step.name)
    if known is None:
        raise step.refused("cannot be said here")
    unknown = sorted(set(step.arguments) - {*EVERYWHERE, *known.reads, *known.ignores})
    if unknown:
        raise step.refused(f"has '{unknown[0]}', which ptq3d does not know")
    kind = step.arguments.get("dtype")
    for one in kind if isinstance(kind, list) else [kind]:
        if one is not None and not (isinstance(one, str) and FLOATS.fullmatch(one)):
            raise step.refused(f"gives voxels the type {one!r}, where ptq3d computes in float32")
    return known
