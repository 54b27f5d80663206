"""Preprocessing as nnU-Net does it: equal to its own on files, and its label maps come back where its own export puts them."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, zoom

from grids import affines, noise, rotation, shapes, spacings
from nnunet_results import architecture, configured, described, library, planned, real_network, write_results
from ptq3d.deployment import deploy
from ptq3d.errors import GeometryError, OptionError, ShapeError
from ptq3d.graphs.export import export_network
from ptq3d.graphs.files import save_graph
from ptq3d.manifest import Manifest, embed
from ptq3d.models.nnunet_folder import from_nnunet
from ptq3d.models.nnunet_plans import preprocessing_of
from ptq3d.options import DeployOptions
from ptq3d.predict import READING_BYTES
from ptq3d.volumes.cells import celled_grid, coarse_axis, resample_cells
from ptq3d.volumes.cropping import crop, crop_to_nonzero, surround
from ptq3d.volumes.files import load_image, load_labels
from ptq3d.volumes.intensity import apply_rules, foreground
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.volume import Volume

NNUNET: dict[str, Any] = {"resampling": "nnunet", "crop": "nonzero", "intensity_first": True}
OBLIQUE = rotation((0.2, -0.3, 0.1))


@dataclass(frozen=True)
class Case:
    """A file and the plans it is prepared by.

    Args:
        shape: (X, Y, Z) of the file.
        linear: its axes and spacing.
        spacing: of the plans, along the network's axes.
        kind: "ct" has grey values everywhere, "mr" only in a ball with a hole.
        schemes: normalisation of each channel.
        masks: use_mask_for_norm of each channel.
        plans: further entries.
    """

    shape: tuple[int, int, int]
    linear: np.ndarray
    spacing: tuple[float, float, float]
    kind: str = "ct"
    schemes: tuple[str, ...] = ("CTNormalization",)
    masks: tuple[bool, ...] = (False,)
    plans: dict[str, Any] = field(default_factory=dict)


MR: dict[str, Any] = {"kind": "mr", "schemes": ("ZScoreNormalization",)}
CASES = {
    "isotropic": Case((40, 36, 30), np.diag([-0.8, -0.8, 0.8]), (1.1, 1.1, 1.1)),
    "finer": Case((24, 20, 18), np.diag([1.5, 1.5, 2.0]), (1.0, 0.9, 0.8)),
    "thick slices": Case((40, 36, 11), np.diag([-0.7, -0.7, 5.0]), (3.1, 1.0, 1.2)),
    "thick slices kept": Case((40, 36, 11), np.diag([-0.7, -0.7, 5.0]), (5.0, 1.0, 1.2)),
    "thick target": Case((30, 28, 26), np.diag([1.0, 1.1, 1.9]), (6.0, 1.3, 1.3)),
    "three times is not thick": Case((30, 28, 12), np.diag([1.0, 1.0, 3.0]), (1.5, 1.5, 1.5)),
    "two thick axes": Case((30, 12, 12), np.diag([0.5, 2.0, 2.0]), (1.2, 1.2, 1.2)),
    "thick in X": Case((12, 30, 28), np.diag([4.0, 0.9, 1.0]), (1.4, 1.1, 2.0)),
    "thick in Y": Case((30, 12, 28), np.diag([0.9, 4.0, 1.0]), (1.4, 2.0, 1.1)),
    "same voxels": Case((16, 15, 14), np.diag([1.0, 1.0, 2.0]), (2.0, 1.0, 1.0)),
    "transposed": Case(
        (40, 30, 12), np.diag([-0.7, -0.8, 3.0]), (1.2, 2.5, 1.0),
        plans={"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]},
    ),
    "rolled": Case(
        (40, 30, 20), np.diag([-0.7, 0.8, -1.5]), (1.2, 1.5, 1.0),
        plans={"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]},
    ),
    "turned file": Case((24, 30, 28), OBLIQUE @ np.diag([-1.0, 0.9, 1.2])[:, [2, 0, 1]], (1.3, 1.2, 1.1)),
    "reoriented": Case(
        (24, 30, 28), np.diag([-1.0, 0.9, -1.2])[:, [2, 0, 1]], (1.3, 1.2, 1.1),
        plans={"image_reader_writer": "NibabelIOWithReorient"},
    ),
    "reoriented by sitk": Case(
        (24, 30, 28), np.diag([-1.0, 0.9, -1.2])[:, [2, 0, 1]], (1.3, 1.2, 1.1),
        plans={"image_reader_writer": "SimpleITKIOWithReorient"},
    ),
    "nibabel": Case((24, 30, 28), np.diag([-1.0, 0.9, -1.2]), (1.3, 1.2, 1.1), plans={"image_reader_writer": "NibabelIO"}),
    "mr": Case((40, 36, 30), np.diag([0.9, 0.9, 1.2]), (1.1, 1.1, 1.1), **MR),
    "mr masked": Case((40, 36, 30), np.diag([0.9, 0.9, 1.2]), (1.1, 1.1, 1.1), **MR, masks=(True,)),
    "mr thick masked": Case((40, 36, 12), np.diag([0.9, 0.9, 4.0]), (2.0, 1.1, 1.1), **MR, masks=(True,)),
    "rescaled": Case((20, 22, 24), np.diag([1.0, 1.0, 1.0]), (0.8, 0.8, 0.8), schemes=("RescaleTo01Normalization",)),
    "plain": Case((20, 22, 24), np.diag([1.0, 1.0, 1.0]), (0.8, 0.8, 0.8), schemes=("NoNormalization",)),
    "two channels": Case(
        (40, 36, 30), np.diag([0.9, 0.9, 1.2]), (1.1, 1.1, 1.1), "mr", ("CTNormalization", "ZScoreNormalization"), (False, True),
    ),
}  # fmt: skip


def made_image(case: Case, seed: int = 0) -> np.ndarray:
    """(X, Y, Z) float32: smooth structures and noise; for MR a ball off the middle with zeros around and a hole of zeros."""
    generator = np.random.default_rng(seed)
    smooth = gaussian_filter(generator.normal(size=case.shape), 2.5)
    image = 60 + 900 * smooth / smooth.std() * 0.25 + generator.normal(size=case.shape) * 20
    if case.kind == "mr":
        places = np.indices(case.shape) - (np.array(case.shape) * [0.45, 0.5, 0.55])[:, None, None, None]
        radius = np.sqrt((places**2 / (np.array(case.shape) * 0.36)[:, None, None, None] ** 2).sum(axis=0))
        image = np.where((radius < 1) & (radius > 0.3 - 0.05 * seed), np.abs(image) + 5, 0)
    return image.astype(np.float32)


def saved(case: Case, folder: Path) -> list[Path]:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = case.linear, (12.5, -40.0, 7.25)
    paths = []
    for channel in range(len(case.schemes)):
        paths.append(folder / f"case_{channel:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(made_image(case, channel), affine), paths[-1])
    return paths


def plans_of(case: Case) -> dict[str, Any]:
    chosen = configured(
        spacing=list(case.spacing), normalization_schemes=list(case.schemes), use_mask_for_norm=list(case.masks)
    )
    return planned(chosen, **case.plans)


def prepared_by_nnunet(plans: dict[str, Any], paths: list[Path]) -> tuple[np.ndarray, dict[str, Any]]:
    """(C, x, y, z) float32 as the real preprocessor gives it, and what it notes on the way."""
    manager = library("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(plans)
    preprocessor = library("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor(
        verbose=False
    )
    configuration = manager.get_configuration("3d_fullres")
    dataset = described(channels=len(paths))
    data, _, properties = preprocessor.run_case([str(path) for path in paths], None, manager, configuration, dataset)
    return np.asarray(data), properties


def loaded(paths: list[Path]) -> Volume:
    volumes = [load_image(path) for path in paths]
    return Volume(np.concatenate([volume.data for volume in volumes]), volumes[0].affine)


@pytest.mark.parametrize("name", CASES)
def test_preprocessing_is_nnunets_on_files(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    paths, plans = saved(case, tmp_path), plans_of(case)
    theirs, _ = prepared_by_nnunet(plans, paths)
    preprocessing = preprocessing_of(plans, plans["configurations"]["3d_fullres"], channels=len(paths))
    ours = preprocessing.apply(loaded(paths))
    assert ours.data.shape == theirs.shape
    assert ours.data.dtype == np.float32
    assert ours.data.flags.c_contiguous
    np.testing.assert_allclose(ours.data, theirs, rtol=0, atol=1e-4 * np.ptp(theirs))


@pytest.mark.parametrize("name", ["isotropic", "thick slices", "transposed", "reoriented", "turned file"])
def test_the_grid_says_where_the_voxels_lie(name: str, tmp_path: Path) -> None:
    """A linear ramp in the world stays that ramp, but for the voxels near the border and the steps of nearest planes."""
    case = CASES[name]
    affine = np.eye(4)
    affine[:3, :3] = case.linear
    direction = np.array([0.3, -0.5, 0.8])
    world = np.tensordot(affine[:3, :3], np.indices(case.shape), axes=1)
    ramp = Volume(np.tensordot(direction, world, axes=1)[None].astype(np.float32) + 1000, affine)
    plans = plans_of(case)
    preprocessing = preprocessing_of(plans, plans["configurations"]["3d_fullres"], channels=1)
    preprocessing = Preprocessing(**{**vars(preprocessing), "intensity": ()})
    found = preprocessing.apply(ramp)
    assert found.grid[0] == preprocessing.grid(ramp.grid)[0]
    np.testing.assert_allclose(found.affine, preprocessing.grid(ramp.grid)[1])
    places = np.tensordot(found.affine[:3, :3], np.indices(found.shape), axes=1) + found.affine[:3, 3, None, None, None]
    wanted = np.tensordot(direction, places, axes=1) + 1000
    before = Volume(
        np.zeros((1, 1, 1, 1), np.uint8), Preprocessing(**{**vars(preprocessing), "spacing": None}).grid(ramp.grid)[1]
    )
    coarse = coarse_axis(before.spacing, case.spacing)
    inner = tuple(slice(None) if axis == coarse else slice(3, -3) for axis in range(3))
    step = 0.0 if coarse is None else before.spacing[coarse] / 2
    assert np.abs(found.data[0][inner] - wanted[inner]).max() <= step + 0.05


@settings(max_examples=60, deadline=None)
@given(shapes(3, 12), affines(), spacings())
def test_old_and_new_cells_fill_the_same_box(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, float, float]
) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.round(sizes / spacing * shape) < 1).any():
        return
    counts, moved = celled_grid((shape, affine), spacing)
    for corner in ((0, 0, 0), (1, 1, 1), (1, 0, 1)):
        old = affine @ [*(np.array(corner) * shape - 0.5), 1]
        new = moved @ [*(np.array(corner) * counts - 0.5), 1]
        np.testing.assert_allclose(new, old, atol=1e-6)
    assert counts == tuple(round(one) for one in sizes / spacing * shape)


@settings(max_examples=40, deadline=None)
@given(shapes(2, 9), affines(), spacings(), st.integers(0, 100))
def test_resampling_keeps_to_the_values_there_are(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, float, float], seed: int
) -> None:
    if (np.round(np.linalg.norm(affine[:3, :3], axis=0) / spacing * shape) < 1).any():
        return
    volume = Volume(noise((2, *shape), seed), affine)
    found = resample_cells(volume, spacing)
    for before, after in zip(volume.data, found.data, strict=True):
        assert before.min() <= after.min()
        assert after.max() <= before.max()
    constant = resample_cells(Volume(np.full((1, *shape), 3.25, np.float32), affine), spacing)
    np.testing.assert_array_equal(constant.data, 3.25)


@pytest.mark.parametrize("sizes", [(7, 12), (12, 7), (1, 5), (5, 1), (3, 3), (40, 41)])
def test_splines_are_scipys(sizes: tuple[int, int]) -> None:
    data = noise((1, sizes[0], 9, 8))
    spacing = (sizes[0] / sizes[1], 9 / 14, 8 / 5)
    ours = resample_cells(Volume(data, np.eye(4)), spacing)
    factors = (sizes[1] / sizes[0], 14 / 9, 5 / 8)
    theirs = zoom(data[0].astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)
    if coarse_axis((1.0, 1.0, 1.0), spacing) is None:
        np.testing.assert_allclose(ours.data[0], np.clip(theirs, data.min(), data.max()), atol=1e-5)
    assert ours.shape == (sizes[1], 14, 5)


@pytest.mark.parametrize("spacing", [(0.6, 0.6, 0.6), (1.9, 1.9, 1.9), (4.0, 0.7, 0.7)])
@pytest.mark.parametrize("rule", ["z_score", "masked_z_score"])
def test_no_more_memory_is_needed_than_a_limit_reckons_with(spacing: tuple[float, float, float], rule: str) -> None:
    """`predict.estimated_bytes`: 20 bytes a voxel of the file, 4 of them the image, and three times the result."""
    image = Volume(made_image(Case((96, 90, 80), np.eye(3), spacing, "mr"))[None], np.eye(4))
    preprocessing = Preprocessing(None, spacing, ({"rule": rule},), axes=(2, 1, 0), **NNUNET)
    preprocessing.apply(Volume(noise((1, 8, 8, 8)), np.eye(4)))  # what is imported on first use does not count
    tracemalloc.start()
    preprocessing.apply(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = 4 * np.prod(preprocessing.grid(image.grid)[0])
    assert peak < (READING_BYTES - 4) * image.data[0].size + 3 * result


@pytest.mark.parametrize(
    ("present", "wanted", "axis"),
    [
        ((1.0, 1.0, 3.0), (1.0, 1.0, 1.0), None),
        ((1.0, 1.0, 3.0 + 1e-6), (1.0, 1.0, 1.0), None),
        ((1.0, 1.0, 3.1), (9.0, 1.0, 1.0), 2),
        ((1.0, 1.0, 1.0), (9.0, 1.0, 1.0), 0),
        ((0.3, 1.0, 1.0 + 1e-7), (9.0, 1.0, 1.0), None),
    ],
)
def test_planes_are_kept_apart_where_spacing_is_anisotropic(
    present: tuple[float, float, float], wanted: tuple[float, float, float], axis: int | None
) -> None:
    assert coarse_axis(present, wanted) == axis


def test_a_spacing_that_leaves_no_voxel_is_refused() -> None:
    with pytest.raises(GeometryError, match="micrometres"):
        celled_grid(((4, 4, 4), np.eye(4)), (10.0, 1.0, 1.0))
    with pytest.raises(GeometryError, match="micrometres"):
        celled_grid(((400, 400, 400), np.eye(4)), (0.01, 0.01, 0.01))


def test_the_nonzero_box_is_cut_out_where_it_lies() -> None:
    data = np.zeros((2, 6, 7, 8), np.float32)
    data[0, 2, 3, 4], data[1, 4, 3, 1] = 5, -1
    affine = np.array([[0, 2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    found = crop_to_nonzero(Volume(data, affine))
    np.testing.assert_array_equal(found.data, data[:, 2:5, 3:4, 1:5])
    np.testing.assert_allclose(found.affine @ [0, 0, 0, 1], affine @ [2, 3, 1, 1])
    empty = Volume(np.zeros((1, 3, 3, 3), np.float32), affine)
    assert crop_to_nonzero(empty) is empty
    back = crop(surround(found), (slice(1, -1),) * 3)
    np.testing.assert_array_equal(back.data, found.data)


def test_holes_are_foreground() -> None:
    shell = np.ones((1, 5, 5, 5), np.float32)
    shell[0, 2, 2, 2] = 0
    assert foreground(shell).all()
    shell[0, 2, 2, :] = 0  # a tunnel to the outside is no hole
    assert foreground(shell).sum() == 120


def test_rules_of_a_channel_leave_the_others() -> None:
    data = noise((2, 4, 5, 6))
    before = data.copy()
    rules = ({"rule": "standardize", "mean": 1.0, "deviation": 2.0, "channel": 1},)
    found = apply_rules(data, rules)
    np.testing.assert_array_equal(data, before)
    np.testing.assert_array_equal(found[0], data[0])
    np.testing.assert_allclose(found[1], (data[1] - 1) / 2, atol=1e-6)
    with pytest.raises(ShapeError, match="channel 1, the image has 1"):
        apply_rules(data[:1], rules)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axes": [0, 1]}, "'axes' holds"),
        ({"axes": [0, 1, 1]}, "'axes' holds"),
        ({"axes": [0, 1, 2.0]}, "'axes' holds"),
        ({"axes": 3}, r"'axes' cannot be 3; .*\[2, 1, 0\]"),
        ({"resampling": "cubic"}, "'resampling' is one of linear, nnunet"),
        ({"crop": "box"}, "'crop' is one of none, nonzero"),
        ({"crop": 1}, "'crop' cannot be 1"),
        ({"intensity": [{"rule": "range", "channel": -1}]}, "counts from 0"),
        ({"intensity": [{"rule": "range", "channel": 1.0}]}, "counts from 0"),
        ({"intensity": [{"rule": "masked_z_score", "inside": 1}]}, r"got \['inside'\]"),
    ],
)
def test_choices_without_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preprocessing.from_dict(values)


def test_a_deviation_must_be_above_zero() -> None:
    rule = {"rule": "standardize", "mean": 0.0, "deviation": 0.0}
    with pytest.raises(OptionError, match="deviation above zero"):
        apply_rules(noise((1, 2, 2, 2)), (rule,))


def test_labels_follow_the_crop_of_their_image() -> None:
    image = Volume(made_image(CASES["mr"])[None], np.diag([0.9, 0.9, 1.2, 1.0]))
    preprocessing = Preprocessing(None, (1.5, 1.5, 1.5), axes=(2, 1, 0), **NNUNET)
    ready = preprocessing.apply(image)
    labels = Volume((image.data > 60).astype(np.uint8), image.affine)
    assert preprocessing.apply_labels(labels, ready.grid).shape == ready.shape
    with pytest.raises(OptionError, match="grid of the preprocessed image"):
        preprocessing.apply_labels(labels)


def deployed(tmp_path: Path, folder: Path, image: Path, **options: Any) -> np.ndarray:
    """Labels of a volume from the exported network of a folder of results."""
    (found,) = from_nnunet(folder)
    assert found.window is not None
    assert found.labels is not None
    exported = export_network(found.network, channels=found.in_channels, window=found.window)
    embed(exported.model, Manifest(found.labels, found.window, found.preprocessing, 0.5, found.name))
    save_graph(exported.model, tmp_path / "net.onnx")
    options = {"engine": "torch", "quiet": True, "output": tmp_path / "out", **options}
    (result,) = deploy(DeployOptions(model=tmp_path / "net.onnx", data=image, **options))
    assert result.error is None
    written = load_labels(result.labels)
    assert written.shape == load_image(image).shape
    np.testing.assert_allclose(written.affine, load_image(image).affine, atol=1e-5)
    return written.data[0]


@pytest.mark.parametrize("name", ["isotropic", "rolled", "mr", "reoriented", "turned file"])
def test_label_maps_are_those_of_nnunets_export(name: str, tmp_path: Path) -> None:
    """One window holds the whole volume, so that both see it alike."""
    case = CASES[name]
    plans = plans_of(case)
    plans["configurations"]["3d_fullres"].update(architecture=architecture(), patch_size=[40, 40, 40])
    network = real_network(architecture())
    (path,) = saved(case, tmp_path)
    data, properties = prepared_by_nnunet(plans, [path])
    with torch.no_grad():  # so that all classes win somewhere
        network.decoder.seg_layers[-1].bias -= torch.from_numpy(logits_of(network, data).mean(axis=(1, 2, 3)))
    folder, logits = write_results(tmp_path, {"0": network.state_dict()}, plans), logits_of(network, data)
    wanted = exported_by_nnunet(plans, logits, properties)
    if name == "reoriented":
        wanted = as_stored(wanted, path)
    assert min(np.bincount(wanted.ravel(), minlength=3)) > 0.02 * wanted.size
    found = deployed(tmp_path, folder, path)
    assert (found == wanted).mean() >= 0.999
    if name in ("isotropic", "mr"):
        nearest = deployed(tmp_path, folder, path, restore="labels", output=tmp_path / "nearest")
        assert (nearest == nearest_labels(logits, load_image(path).data[0])).mean() >= 0.999


def as_stored(labels: np.ndarray, path: Path) -> np.ndarray:
    """RAS labels in the order of the file's axes."""
    stored = nibabel.io_orientation(nibabel.load(path).affine)
    canonical = nibabel.orientations.axcodes2ornt("RAS")
    turned: np.ndarray = nibabel.orientations.apply_orientation(
        labels, nibabel.orientations.ornt_transform(canonical, stored)
    )
    return turned


def nearest_labels(logits: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Labels of the new cell that the middle of each old cell lies in; background outside the box that is not 0."""
    box = tuple(slice(ends.min(), ends.max() + 1) for ends in np.nonzero(image))
    labels, inner = logits.argmax(0).transpose(2, 1, 0), image[box].shape
    places = [((np.arange(old) + 0.5) * new / old).astype(int) for old, new in zip(inner, labels.shape, strict=True)]
    whole = np.zeros(image.shape, int)
    whole[box] = labels[np.ix_(*places)]
    return whole


def logits_of(network: torch.nn.Module, data: np.ndarray) -> np.ndarray:
    """(K, x, y, z) of a volume within one window, padded by 0 on both sides as nnU-Net pads it."""
    lacks = [40 - size for size in data.shape[1:]]
    padded = np.pad(data, [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks)])
    with torch.no_grad():
        logits = network(torch.from_numpy(padded)[None])[0].numpy()
    x, y, z = (slice(lack // 2, lack // 2 + size) for lack, size in zip(lacks, data.shape[1:], strict=True))
    cut: np.ndarray = logits[:, x, y, z]
    return cut


def exported_by_nnunet(plans: dict[str, Any], logits: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """(X, Y, Z) labels in the order of axes that the reader left."""
    manager = library("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(plans)
    convert = library(
        "nnunetv2.inference.export_prediction"
    ).convert_predicted_logits_to_segmentation_with_correct_shape
    labels = convert(
        torch.from_numpy(logits),
        manager,
        manager.get_configuration("3d_fullres"),
        manager.get_label_manager(described()),
        properties,
    )
    return np.asarray(labels).transpose(2, 1, 0)
