"""Training learns, repeats itself, resumes where it stopped, and says what is wrong before it writes anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ptq3d.training
from ptq3d.datasets.folders import find_cases
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import (
    CheckpointError,
    FileError,
    GeometryError,
    InputError,
    IntensityError,
    LabelError,
    OptionError,
    ShapeError,
    UnavailableError,
)
from ptq3d.models.sources import load_network, read_description
from ptq3d.training import TrainingOptions, train
from ptq3d.training.cases import read_cases, split_cases
from ptq3d.training.options import schedule_of
from ptq3d.volumes.preprocessing import Preprocessing

NAMES = ("background", "bright ball", "dark ball")
PREPROCESSING = Preprocessing("RAS", (2.0, 2.0, 2.0), ({"rule": "window", "low": -100.0, "high": 100.0},))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Windows of 16^3 gain nothing from a second thread, and lose much where another process holds its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_case(folder: Path, index: int, axcodes: str = "RAS") -> None:
    """Two balls that only their brightness tells apart, 2 mm, in any orientation."""
    rng = np.random.default_rng(index)
    grid = np.indices((26, 22, 20)).astype(float)
    image, labels = rng.normal(0, 10, grid.shape[1:]), np.zeros(grid.shape[1:], np.uint8)
    for value, label, side in ((70, 1, 7), (-70, 2, 18)):
        centre = np.array((side, 11, 10)) + rng.uniform(-2, 2, 3)
        ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < 4.5**2
        image[ball], labels[ball] = image[ball] + value, label
    for kind, name, data in (("images", "img", image.astype(np.int16)), ("labels", "label", labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        file = nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0]))
        target = nibabel.orientations.axcodes2ornt(axcodes)
        nibabel.save(file.as_reoriented(target), folder / kind / f"{name}{index:04d}.nii.gz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balls")
    for index, axcodes in enumerate(("RAS", "LPS", "SPL", "LAS", "RAS")):
        write_case(folder, index, axcodes)
    return folder


def options(data: Path | None, output: Path, **changes: Any) -> TrainingOptions:
    base = TrainingOptions(
        () if data is None else tuple(find_cases(data / "images", data / "labels")),
        output,
        LabelMap.identity(NAMES),
        PREPROCESSING,
        channels=(8, 16),
        window=(16, 16, 16),
        max_steps=24,
        learning_rate=1e-2,
        val_fraction=0.2,
        accelerator="cpu",
        quiet=True,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingOptions, Any]:
    chosen = options(data, tmp_path_factory.mktemp("run"), max_steps=60, seed_checkpoint=True)
    return chosen, train(chosen)


def test_it_learns(trained: tuple[TrainingOptions, Any]) -> None:
    _, result = trained
    assert len(result.losses) == 60
    assert np.mean(result.losses[-5:]) < 0.3 * np.mean(result.losses[:5])
    assert result.validation_dice[-1] > 0.85
    assert len(result.validation_dice) == 8  # 4 cases x 4 windows / batch of 2: an epoch for every 8 steps


def test_what_it_leaves(trained: tuple[TrainingOptions, Any]) -> None:
    chosen, result = trained
    assert (result.best, result.last) == (chosen.output_dir / "best.ckpt", chosen.output_dir / "last.ckpt")
    assert sorted(path.name for path in chosen.output_dir.iterdir()) == [
        "best.ckpt",
        "checkpoint_epoch_8.pth",
        "last.ckpt",
        "logs",
    ]
    assert list((chosen.output_dir / "logs").glob("events.out.tfevents*"))


def test_checkpoints_load_as_plain_values_and_describe_themselves(trained: tuple[TrainingOptions, Any]) -> None:
    chosen, result = trained
    for path in (result.best, result.last, result.seed_checkpoint):
        assert "ptq3d" in torch.load(path, weights_only=True)
        assert read_description(path) == {
            "architecture": "unet",
            "in_channels": 1,
            "num_classes": 3,
            "channels": [8, 16],
            "labels": list(NAMES),
            "preprocessing": PREPROCESSING.to_dict(),
            "window": [16, 16, 16],
            "overlap": 0.5,
        }
        assert Preprocessing.from_dict(read_description(path)["preprocessing"]) == chosen.preprocessing


def test_the_seeds_layout_holds_the_last_weights(trained: tuple[TrainingOptions, Any]) -> None:
    _, result = trained
    content = torch.load(result.seed_checkpoint, weights_only=True)
    assert content.keys() == {"epoch", "model_state_dict", "ptq3d"}
    assert content["epoch"] == 8
    last, released = load_network(result.last).state_dict(), load_network(result.seed_checkpoint, "unet").state_dict()
    assert all(torch.equal(last[name], released[name]) for name in last)


def test_the_best_checkpoint_has_the_best_dice(data: Path, trained: tuple[TrainingOptions, Any]) -> None:
    """The Dice that the training kept, computed again from best.ckpt with MONAI's own inferer and metric."""
    from monai.inferers import SlidingWindowInferer
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot

    chosen, result = trained
    _, (case,) = split_cases(read_cases(chosen), chosen)
    network = load_network(result.best)
    with torch.no_grad():
        logits = SlidingWindowInferer((16, 16, 16), 2, 0.5, "gaussian")(case.image[None], network)
    dice = compute_dice(
        one_hot(logits.argmax(1, keepdim=True), 3), one_hot(case.classes[None], 3), include_background=False
    )
    assert float(dice.mean()) == pytest.approx(max(result.validation_dice), abs=2e-3)


def test_the_same_seed_gives_the_same_losses(data: Path, tmp_path: Path) -> None:
    first, again, other = (
        train(options(data, tmp_path / name, max_steps=10, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.losses == again.losses
    assert first.validation_dice == again.validation_dice
    assert first.losses != other.losses


class Interruption(Exception):
    """Stands for a machine that goes down."""


def test_a_resumed_run_is_the_uninterrupted_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq3d.training.segmenter import Segmenter

    whole = train(options(data, tmp_path / "whole"))
    step = Segmenter.training_step

    def stop(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == 19:
            raise Interruption
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(Segmenter, "training_step", stop)
        with pytest.raises(Interruption):
            train(options(data, tmp_path / "stopped"))
    rest = train(options(data, tmp_path / "stopped", resume=tmp_path / "stopped" / "last.ckpt"))
    assert rest.losses == whole.losses[16:]
    assert rest.validation_dice == whole.validation_dice[2:]


def test_a_finished_run_goes_on_for_more_epochs(data: Path, tmp_path: Path) -> None:
    first = train(options(data, tmp_path, max_steps=None, epochs=1))
    more = options(data, tmp_path, max_steps=None, epochs=2, resume=first.last)
    assert len(train(more).losses) == 8
    with pytest.raises(OptionError, match="all 2 epochs are done"):
        train(more)


def test_without_validation_the_loss_decides(data: Path, tmp_path: Path) -> None:
    result = train(options(data, tmp_path, val_fraction=0.0, max_steps=20))
    assert result.validation_dice == ()
    epochs = [np.mean(result.losses[:10]), np.mean(result.losses[10:])]
    callbacks = torch.load(result.last, weights_only=True)["callbacks"].values()
    (score,) = (float(state["best_model_score"]) for state in callbacks if state.get("monitor"))
    assert score == pytest.approx(min(epochs), rel=1e-5)


def test_bfloat16_and_transunet(data: Path, tmp_path: Path) -> None:
    result = train(options(data, tmp_path, architecture="transunet", precision="bf16-mixed", max_steps=4))
    assert np.isfinite(result.losses).all()
    assert load_network(result.last).positions.shape == (1, 8**3, 48)


def test_silent_without_a_terminal(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(options(data, tmp_path, max_steps=2, quiet=False))
    assert capfd.readouterr() == ("", "")


@given(
    steps=st.integers(1, 500),
    cases=st.integers(1, 40),
    windows=st.integers(1, 8),
    batch=st.integers(1, 4),
    processes=st.integers(1, 4),
)
@settings(max_examples=50, deadline=None)
def test_epochs_add_up_to_the_steps(steps: int, cases: int, windows: int, batch: int, processes: int) -> None:
    chosen = options(None, Path(), max_steps=steps, windows_per_case=windows, batch_size=batch)
    by_steps = schedule_of(chosen, cases, processes)
    lengths = [by_steps.steps_of(epoch) for epoch in range(by_steps.epochs)]
    assert sum(lengths) == steps == by_steps.steps
    assert max(lengths) - min(lengths) <= 1
    by_epochs = schedule_of(replace(chosen, max_steps=None, epochs=3), cases, processes)
    assert by_epochs.epochs == 3
    assert by_epochs.steps_of(1) * batch * processes >= cases * windows


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_dice_equals_monai(draw: st.DataObject) -> None:
    """NaN only where a class is absent in both; MONAI, told to ignore empty truth, says NaN wherever truth has none."""
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot

    from ptq3d.training.segmenter import dice_per_class

    classes = draw.draw(st.integers(2, 5))
    seed = draw.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    prediction, truth = (torch.from_numpy(rng.integers(0, rng.integers(1, classes + 1), (4, 3, 2))) for _ in range(2))
    ours = dice_per_class(prediction, truth, classes)
    masks = [one_hot(labels[None, None], classes) for labels in (prediction, truth)]
    peer = compute_dice(*masks, include_background=False, ignore_empty=False)[0].double()
    absent = torch.tensor([not ((prediction == k).any() or (truth == k).any()) for k in range(1, classes)])
    assert torch.equal(ours.isnan(), absent)
    torch.testing.assert_close(ours[~absent], peer[~absent], rtol=1e-6, atol=1e-6)


def test_windows_show_every_class_and_keep_left_and_right(data: Path) -> None:
    from ptq3d.training.segmenter import _fields, window_transform

    chosen = options(data, Path(), window=(8, 8, 8))
    case = read_cases(chosen)[0]
    ramp = torch.arange(case.image.shape[1], dtype=torch.float32)[None, :, None, None].expand_as(case.image).clone()
    transform = window_transform(chosen).set_random_state(0)
    windows = [transform(_fields(replace(case, image=ramp)))[0] for _ in range(90)]
    for number in (1, 2):
        assert sum(bool((window["label"] == number).any()) for window in windows) >= 25
    for window in windows:
        assert window["image"].shape == window["label"].shape == (1, 8, 8, 8)
        assert type(window["image"]) is torch.Tensor
        x, y, z = (window["image"].diff(dim=axis).mean() for axis in (1, 2, 3))
        assert x > 0.5
        assert max(abs(y), abs(z)) < 0.4


def test_windows_keep_image_and_labels_together(data: Path) -> None:
    from ptq3d.training.segmenter import _fields, window_transform

    chosen = options(data, Path())
    case = read_cases(chosen)[0]
    transform = window_transform(chosen).set_random_state(1)
    for _ in range(20):
        window = transform(_fields(replace(case, image=(case.classes == 1).float())))[0]
        inside, outside = (window["image"][mask] for mask in (window["label"] == 1, window["label"] != 1))
        if len(inside):
            assert inside.median() > 0.6 > 0.4 > outside.median()


def test_cases_are_what_deployment_sees(data: Path) -> None:
    """Padding apart, image and classes of a case are those of the preprocessing object, in its orientation."""
    from ptq3d.volumes.files import load_image, load_labels

    chosen = options(data, Path(), window=(32, 16, 16), preprocessing=replace(PREPROCESSING, outside=0.25))
    for index, case in enumerate(read_cases(chosen)):
        image = load_image(data / "images" / f"img{index:04d}.nii.gz")
        labels = load_labels(data / "labels" / f"label{index:04d}.nii.gz")
        assert case.image.shape == (1, 32, 22, 20)
        np.testing.assert_array_equal(case.image[:, 3:29], chosen.preprocessing.apply(image).data)
        np.testing.assert_array_equal(case.classes[:, 3:29], chosen.preprocessing.apply_labels(labels).data)
        assert (case.image[:, :3] == 0.25).all()
        assert (case.classes[:, 29:] == 0).all()
        for number, centres in enumerate(case.centres):
            assert (case.classes.flatten()[centres] == number).all()
            assert len(centres) == (case.classes == number).sum()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": (16, 16, 15)}, ShapeError, "multiple of 2"),
        ({"architecture": "vnet"}, OptionError, "vnet"),
        ({"precision": "int8"}, OptionError, "bf16-mixed"),
        ({"precision": "16-mixed"}, UnavailableError, "needs a GPU"),
        ({"epochs": 3}, OptionError, "Give one of them"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1"),
        ({"max_steps": -1}, OptionError, "max_steps must be at least 1"),
        ({"val_fraction": 1.0}, OptionError, "val_fraction"),
        ({"overlap": -0.1}, OptionError, "overlap"),
        ({"val_fraction": 0.95}, OptionError, "leaves none to train on"),
        ({"learning_rate": 0.0}, OptionError, "learning_rate"),
        ({"learning_rate": float("nan")}, OptionError, "learning_rate"),
        ({"workers": -1}, OptionError, "workers"),
        ({"seed": -1}, OptionError, "seed"),
        ({"label_map": LabelMap.identity(NAMES[:2])}, LabelError, r"label0000\.nii\.gz.*2"),
        ({"label_map": LabelMap(NAMES, {}, others=0)}, LabelError, "no training case"),
        ({"resume": Path("gone.ckpt")}, FileError, r"gone\.ckpt"),
        ({"accelerator": "abacus"}, UnavailableError, "abacus"),
    ],
)
def test_options_without_a_meaning(
    changes: dict[str, Any], error: type[InputError], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(options(data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_accelerator_that_is_not_there(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnavailableError, match="accelerator 'gpu'"):
        train(options(data, tmp_path / "out", accelerator="gpu"))
    assert not (tmp_path / "out").exists()


def break_missing_label(folder: Path) -> None:
    (folder / "labels" / "label0001.nii.gz").unlink()


def break_empty_folder(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.unlink()


def break_grid(folder: Path) -> None:
    path = folder / "labels" / "label0001.nii.gz"
    labels = nibabel.load(path)
    moved = labels.affine.copy()
    moved[0, 3] += 10
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels.dataobj), moved), path)


def break_nan(folder: Path) -> None:
    path = folder / "images" / "img0001.nii.gz"
    image = nibabel.load(path)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)


def break_truncated(folder: Path) -> None:
    path = folder / "images" / "img0001.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_missing_label, LabelError, r"img0001\.nii\.gz"),
        (break_empty_folder, FileError, "images"),
        (break_grid, GeometryError, r"label0001\.nii\.gz"),
        (break_nan, IntensityError, r"img0001\.nii\.gz"),
        (break_truncated, FileError, r"img0001\.nii\.gz"),
    ],
)
def test_data_that_cannot_be_used(damage: Any, error: type[InputError], message: str, tmp_path: Path) -> None:
    for index in range(2):
        write_case(tmp_path, index)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        train(options(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_case_without_labels_is_named(data: Path, tmp_path: Path) -> None:
    chosen = options(data, tmp_path / "out")
    unlabelled = (chosen.cases[0].unlabelled(), *chosen.cases[1:])
    with pytest.raises(LabelError, match=r"img0000\.nii\.gz: has no label map"):
        train(replace(chosen, cases=unlabelled))


def test_an_image_that_a_rule_cannot_scale_is_named(tmp_path: Path) -> None:
    write_case(tmp_path, 0)
    flat = nibabel.Nifti1Image(np.zeros((26, 22, 20), np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    nibabel.save(flat, tmp_path / "images" / "img0000.nii.gz")
    with pytest.raises(IntensityError, match=r"img0000\.nii\.gz.*constant"):
        train(options(tmp_path, tmp_path / "out", preprocessing=Preprocessing(intensity=({"rule": "range"},))))


def test_resuming_another_training_is_refused(data: Path, tmp_path: Path, trained: tuple[TrainingOptions, Any]) -> None:
    last = trained[1].last
    with pytest.raises(CheckpointError, match=r"channels \[8, 16\], the options say \[4, 8\]"):
        train(options(data, tmp_path / "out", resume=last, channels=(4, 8)))
    with pytest.raises(CheckpointError, match="window"):
        train(options(data, tmp_path / "out", resume=last, window=(16, 16, 8)))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of"):
        train(options(data, tmp_path / "out", resume=tmp_path / "foreign.ckpt"))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq3d.training.segmenter import DiceCELoss

    monkeypatch.setattr(DiceCELoss, "forward", lambda self, logits, labels: logits.sum() * torch.nan)
    with pytest.raises(OptionError, match=r"loss is nan at step 0.*Lower the learning rate"):
        train(options(data, tmp_path))


def test_missing_libraries_come_with_the_line_that_mends_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptq3d.training, "find_spec", lambda name: None if name == "monai" else find_spec(name))
    with pytest.raises(UnavailableError, match=r"needs monai.*pip install 'ptq3d\[train\]'"):
        train(options(data, tmp_path / "out"))
