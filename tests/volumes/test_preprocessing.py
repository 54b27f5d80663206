"""Preprocessing is MONAI's on real files, and label maps come back to where the image lies."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import (
    Compose,
    LoadImaged,
    NormalizeIntensity,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)

from grids import affines, noise, orientations, shapes, spacings, world
from ptq3d.errors import FileError, InputError, IntensityError, OptionError, ShapeError
from ptq3d.volumes.files import load_image, load_labels
from ptq3d.volumes.intensity import INTENSITY_RULES
from ptq3d.volumes.preprocessing import PRESETS, Preprocessing
from ptq3d.volumes.volume import Volume

FILES = (
    "abdomen_ct/images/ct.nii.gz",
    "abdomen_mr/images/mr.nii.gz",
    "spine_small/sub-ct_label-22_ct.nii.gz",
    "spine_small/sub-mri_label-6_T2w.nii.gz",
    "whole_brain/test/images/1013.nii.gz",
)
MONAI_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
BRAIN = Preprocessing("LIA", (1.0, 1.0, 1.0), ({"rule": "quantiles", "lower": 0.02, "upper": 0.98},))
MODES = (
    Preprocessing("SPL", None, ({"rule": "z_score", "nonzero": True},)),
    Preprocessing("RAS", (2.0, 2.0, 2.0), ({"rule": "z_score"},)),
    Preprocessing("PIR", None, ({"rule": "range"},)),
)
TRANSFORMS = {
    "window": lambda low, high: ScaleIntensityRanged("image", low, high, 0, 1, clip=True),
    "quantiles": lambda lower, upper: ScaleIntensityRangePercentilesd(
        "image", lower * 100, upper * 100, 0, 1, clip=True
    ),
    "z_score": lambda nonzero=False: NormalizeIntensityd("image", nonzero=nonzero),
    "range": lambda: ScaleIntensityd("image", 0, 1),
}


def monai_pipeline(preprocessing: Preprocessing) -> Compose:
    steps: list[Any] = [LoadImaged("image", ensure_channel_first=True)]
    steps.append(Orientationd("image", axcodes=preprocessing.orientation, labels=MONAI_LABELS))
    if preprocessing.spacing is not None:
        steps.append(Spacingd("image", pixdim=preprocessing.spacing, mode="bilinear"))
    for rule in preprocessing.intensity:
        steps.append(TRANSFORMS[rule["rule"]](**{key: value for key, value in rule.items() if key != "rule"}))
    return Compose(steps)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("preprocessing", [PRESETS["btcv"], BRAIN, *MODES], ids=["btcv", "brain", "a", "b", "c"])
def test_preprocessing_is_monais_on_real_files(shared: Path, file: str, preprocessing: Preprocessing) -> None:
    path = shared / "data" / file
    ours = preprocessing.apply(load_image(path))
    theirs = monai_pipeline(preprocessing)({"image": path})["image"]
    assert ours.shape == tuple(theirs.shape[1:])
    assert ours.data.dtype == np.float32
    assert ours.data.flags.c_contiguous
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-9)
    np.testing.assert_allclose(ours.data, theirs.numpy(), atol=1e-4)


def test_the_z_score_of_nonzero_voxels_is_monais(shared: Path) -> None:
    """On one resampled image: MONAI's own resampling leaves 1e-11 where zeros meet, and its z-score takes them for tissue."""
    image = Preprocessing("RAS", (2.3, 1.1, 3.0)).apply(load_image(shared / "data" / FILES[-1])).data
    theirs = NormalizeIntensity(nonzero=True)(torch.from_numpy(image.copy())).numpy()
    np.testing.assert_allclose(INTENSITY_RULES["z_score"](image, nonzero=True), theirs, atol=1e-4)


def test_intensities_come_first_where_asked() -> None:
    volume = Volume(noise((1, 8, 9, 10)) * 100, np.diag([2.0, 2.0, 2.0, 1.0]))
    rule = ({"rule": "window", "low": -50.0, "high": 50.0},)
    first = Preprocessing("RAS", (1.0, 1.0, 1.0), rule, intensity_first=True).apply(volume)
    windowed = Volume(INTENSITY_RULES["window"](volume.data, -50.0, 50.0), volume.affine)
    np.testing.assert_array_equal(first.data, Preprocessing("RAS", (1.0, 1.0, 1.0)).apply(windowed).data)


def test_the_image_itself_stays_as_it_is() -> None:
    data = noise((1, 5, 6, 7))
    for rule in ({"rule": "window", "low": 0, "high": 1}, {"rule": "z_score"}, {"rule": "clip", "low": 0, "high": 1}):
        Preprocessing(None, None, (rule,)).apply(Volume(data, np.eye(4)))
    np.testing.assert_array_equal(data, noise((1, 5, 6, 7)))


@settings(max_examples=60, deadline=None)
@given(shapes(1, 9), affines(), orientations())
def test_orientation_alone_is_undone_to_the_bit(shape: tuple[int, int, int], affine: np.ndarray, axcodes: str) -> None:
    labels = Volume(np.random.default_rng(0).integers(0, 200, (1, *shape)).astype(np.uint8), affine)
    preprocessing = Preprocessing(axcodes)
    back = preprocessing.restore_labels(preprocessing.apply_labels(labels).data[0], labels.grid)
    np.testing.assert_array_equal(back.data, labels.data)
    np.testing.assert_array_equal(back.affine, affine)


@settings(max_examples=150, deadline=None)
@given(shapes(4, 16), affines(sheared=True), orientations(), spacings(), st.tuples(*[st.floats(-1, 1)] * 3))
def test_restored_labels_agree_away_from_boundaries(
    shape: tuple[int, int, int],
    affine: np.ndarray,
    axcodes: str,
    spacing: tuple[float, float, float],
    normal: tuple[float, float, float],
) -> None:
    """A plane cuts the volume in two; beyond the reach of two nearest-voxel steps both sides come back."""
    direction = np.add(normal, (0.0, 0.0, 1e-3))
    direction /= np.linalg.norm(direction)
    side = np.tensordot(direction, world(shape, affine), axes=1)
    side -= np.median(side)
    labels = Volume(np.where(side > 0, 7, 2).astype(np.uint8)[None], affine)
    preprocessing = Preprocessing(axcodes, spacing)
    moved = preprocessing.apply_labels(labels)
    back = preprocessing.restore_labels(moved.data[0], labels.grid)
    assert back.shape == shape
    assert back.data.dtype == np.uint8
    np.testing.assert_array_equal(back.affine, affine)
    reach = np.linalg.norm(spacing) + np.linalg.norm(labels.spacing)
    clear = np.abs(side) > reach
    np.testing.assert_array_equal(back.data[0][clear], labels.data[0][clear])


@pytest.mark.parametrize("file", ["spine_small/sub-ct_seg-vert_label-22_msk.nii.gz", "abdomen_ct/labels/ct.nii.gz"])
def test_finer_grids_lose_no_label_of_real_files(shared: Path, file: str) -> None:
    labels = load_labels(shared / "data" / file)
    half = tuple(size / 2 for size in labels.spacing)
    preprocessing = Preprocessing(labels.orientation, half)
    back = preprocessing.restore_labels(preprocessing.apply_labels(labels).data[0], labels.grid)
    np.testing.assert_array_equal(back.data, labels.data)
    np.testing.assert_array_equal(back.affine, labels.affine)


@settings(max_examples=40, deadline=None)
@given(shapes(2, 12), affines(), orientations(), spacings())
def test_image_and_labels_share_the_preprocessed_grid(
    shape: tuple[int, int, int], affine: np.ndarray, axcodes: str, spacing: tuple[float, float, float]
) -> None:
    preprocessing = Preprocessing(axcodes, spacing)
    image = preprocessing.apply(Volume(noise((1, *shape)), affine))
    labels = preprocessing.apply_labels(Volume(np.zeros((1, *shape), np.uint8), affine))
    expected_shape, expected_affine = preprocessing.grid((shape, affine))
    for volume in (image, labels):
        assert volume.shape == expected_shape
        np.testing.assert_array_equal(volume.affine, expected_affine)
        assert volume.data.flags.c_contiguous


def test_labels_of_another_grid_are_not_restored() -> None:
    original = Volume(noise((1, 4, 5, 6)), np.eye(4))
    with pytest.raises(ShapeError, match=r"\(2, 3, 4\), got \(4, 5, 6\)"):
        Preprocessing("RAS", (2.0, 2.0, 2.0)).restore_labels(np.zeros((4, 5, 6), np.uint8), original.grid)


def test_preprocessing_needs_two_copies_of_the_result_at_most() -> None:
    volume = Volume(np.asfortranarray(noise((1, 128, 128, 64))), np.diag([-0.8, -0.8, 3.0, 1.0]))
    PRESETS["btcv"].apply(Volume(noise((1, 8, 8, 8)), volume.affine))  # what is imported on first use does not count
    tracemalloc.start()
    result = PRESETS["btcv"].apply(volume)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.6 * result.data.nbytes


@pytest.mark.parametrize("rule", [{"rule": "quantiles", "lower": 0.1, "upper": 0.9}, {"rule": "range"}])
def test_a_constant_image_has_no_range(rule: dict[str, Any]) -> None:
    with pytest.raises(IntensityError, match="constant"):
        Preprocessing(intensity=(rule,)).apply(Volume(np.full((1, 4, 4, 4), 7, np.float32), np.eye(4)))


def test_a_constant_image_has_z_score_zero() -> None:
    for nonzero in (False, True):
        rule = {"rule": "z_score", "nonzero": nonzero}
        for value in (0, 7):
            constant = Volume(np.full((1, 4, 4, 4), value, np.float32), np.eye(4))
            assert not Preprocessing(intensity=(rule,)).apply(constant).data.any()


def numbers_of(rule: str) -> st.SearchStrategy[dict[str, Any]]:
    low = st.floats(0, 0.4)
    high = st.floats(0.5, 1)
    bounds = {"window": ("low", "high"), "clip": ("low", "high"), "quantiles": ("lower", "upper")}
    keys = {**bounds, "standardize": ("mean", "deviation")}.get(rule, ())
    optional: dict[str, st.SearchStrategy[Any]] = {"channel": st.integers(0, 3)}
    if rule == "z_score":
        optional["nonzero"] = st.booleans()
    values = dict(zip(keys, (low, high), strict=False))
    return st.fixed_dictionaries({"rule": st.just(rule), **values}, optional=optional)


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.none() | orientations(),
    spacing=st.none() | spacings(),
    intensity=st.lists(st.sampled_from(sorted(INTENSITY_RULES)).flatmap(numbers_of), max_size=3).map(tuple),
    intensity_first=st.booleans(),
    outside=st.floats(-2000, 2000),
    axes=st.none() | st.permutations(range(3)).map(tuple),
    resampling=st.sampled_from(["linear", "nnunet"]),
    crop=st.sampled_from(["none", "nonzero"]),
)
def test_plain_values_give_the_object_back(**attributes: Any) -> None:
    preprocessing = Preprocessing(**attributes)
    plain = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(plain) == preprocessing


def test_toml_and_json_files_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'orientation = "lia"\nspacing = [1, 1, 1]\n[[intensity]]\nrule = "quantiles"\nlower = 0.02\nupper = 0.98\n'
    )
    (tmp_path / "p.json").write_text(json.dumps(BRAIN.to_dict()))
    assert Preprocessing.load(tmp_path / "p.toml") == Preprocessing.load(tmp_path / "p.json") == BRAIN
    (tmp_path / "stored.toml").write_text('orientation = "none"\nspacing = "none"\n')
    assert Preprocessing.load(tmp_path / "stored.toml") == Preprocessing(None, None)


WRONG: list[tuple[str, type[InputError], str]] = [
    ('{"spacings": [1, 1, 1]}', OptionError, "unknown preprocessing keys .*'spacing'"),
    ('{"orientation": "RAX"}', OptionError, "orientation is one of"),
    ('{"orientation": 3}', OptionError, "'orientation' cannot be 3"),
    ('{"spacing": [1, 1]}', OptionError, "three numbers"),
    ('{"spacing": [1, 1, 0]}', OptionError, "above zero"),
    ('{"spacing": 2}', OptionError, "'spacing' cannot be 2"),
    ('{"intensity": {"rule": "range"}}', OptionError, "'intensity' cannot be"),
    ('{"intensity": ["range"]}', OptionError, "unknown intensity rule 'range'"),
    ('{"intensity": [{"rule": ["range"]}]}', OptionError, "unknown intensity rule"),
    ('{"intensity": [{"rule": "hounsfield"}]}', OptionError, "valid ones are .*'window'"),
    ('{"intensity": [{"low": 1}]}', OptionError, "unknown intensity rule None"),
    ('{"intensity": [{"rule": "window", "low": 1}]}', OptionError, r"missing: \['high'\]"),
    ('{"intensity": [{"rule": "range", "low": 1}]}', OptionError, r"got \['low'\]"),
    ('{"intensity": [{"rule": "clip", "low": "a", "high": 2}]}', OptionError, "finite number"),
    ('{"intensity_first": 1}', OptionError, "'intensity_first' cannot be 1"),
    ('{"outside": NaN}', OptionError, "'outside' must be a finite number"),
    ("[1, 2]", FileError, "must hold a table"),
    ("{", FileError, "no readable TOML or JSON"),
]


@pytest.mark.parametrize(("text", "error", "message"), WRONG)
def test_a_description_without_meaning_is_refused(
    tmp_path: Path, text: str, error: type[InputError], message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        Preprocessing.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_broken_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        Preprocessing.load(tmp_path / "p.json")
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe = 3")
    with pytest.raises(FileError):
        Preprocessing.load(tmp_path / "p.toml")


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "window", "low": 2, "high": 1},
        {"rule": "clip", "low": 1, "high": 1},
        {"rule": "quantiles", "lower": 0.9, "upper": 0.1},
        {"rule": "quantiles", "lower": 2, "upper": 98},
    ],
)
def test_rules_with_bounds_that_cross_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rule["rule"]):
        Preprocessing(intensity=(rule,)).apply(Volume(noise((1, 4, 4, 4)), np.eye(4)))


def test_labels_are_no_image() -> None:
    with pytest.raises(ShapeError, match="float32"):
        Preprocessing().apply(Volume(np.zeros((1, 2, 2, 2), np.uint8), np.eye(4)))
