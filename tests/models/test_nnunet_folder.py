"""A folder of nnU-Net's results gives its networks with all that belongs to them, or says what it cannot do exactly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_results import (
    FORMER,
    PROPERTIES,
    architecture,
    checkpoint_of,
    configured,
    described,
    library,
    planned,
    real_network,
    write_results,
)
from ptq3d.errors import CheckpointError, FileError, InputError, OptionError, ShapeError
from ptq3d.models.nnunet import NnUNet
from ptq3d.models.nnunet_folder import from_nnunet
from ptq3d.models.nnunet_plans import layout_of
from ptq3d.models.sources import load_network, read_checkpoint
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.windows import Size, Windowing, blend, even_starts, nnunet_importance

State = dict[str, torch.Tensor]
WINDOW = (16, 16, 16)


def ours(seed: int = 0, **changes: Any) -> State:
    torch.manual_seed(seed)
    layout = layout_of({"architecture": architecture(**changes)}, in_channels=1, num_classes=3)
    return NnUNet(layout).state_dict()


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_a_fold_is_the_real_network_with_all_that_belongs_to_it(name: str, tmp_path: Path) -> None:
    network = real_network(architecture(name))
    plans = planned(configured(architecture=architecture(name), spacing=[3.0, 1.5, 1.25]), transpose_forward=[1, 0, 2])
    folder = write_results(tmp_path, {"0": network.state_dict()}, plans)
    (found,) = from_nnunet(folder)
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.network(image), network(image), rtol=0, atol=1e-5)
    assert not found.network.training
    assert found.name == ("nnunet" if name == "PlainConvUNet" else "nnunet_resenc")
    assert (found.in_channels, found.window, found.overlap) == (1, (16, 16, 16), 0.5)
    assert found.labels == ("background", "liver", "spleen")
    assert [path.name for path in found.files] == ["checkpoint_final.pth", "plans.json", "dataset.json"]
    assert found.preprocessing == Preprocessing(
        orientation=None,
        spacing=(3.0, 1.5, 1.25),
        intensity=(
            {"rule": "clip", "low": PROPERTIES["percentile_00_5"], "high": PROPERTIES["percentile_99_5"]},
            {"rule": "standardize", "mean": PROPERTIES["mean"], "deviation": PROPERTIES["std"]},
        ),
        intensity_first=True,
        axes=(1, 2, 0),
        resampling="nnunet",
        crop="nonzero",
    )


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_what_the_real_trainer_saves_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = library("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setenv("nnUNet_compile", "false")
    data = tmp_path / "Dataset999_Made" / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()
    plans = planned(configured(architecture=architecture(name)), continue_training=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = module.nnUNetTrainer(plans, "3d_fullres", 0, described(), torch.device("cpu"))
        trainer.initialize()
    trainer.logger.log("train_losses", np.float64(0.3), 0)
    trainer._best_ema = np.float32(0.5)
    folder = Path(trainer.output_folder).parent
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(described()))
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    (found,) = from_nnunet(tmp_path / "results")
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.network(image), trainer.network.eval()(image), rtol=0, atol=1e-5)
    content = read_checkpoint(found.files[0])
    assert (content["trainer_name"], content["_best_ema"]) == ("nnUNetTrainer", 0.5)


def test_plans_of_the_former_format_give_the_same_network(tmp_path: Path) -> None:
    former = {key: value for key, value in configured().items() if key != "architecture"} | FORMER
    widths = {"features_per_stage": [4, 8, 8]}
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours(**widths)}, planned(former)))
    wanted = layout_of({"architecture": architecture(**widths)}, in_channels=1, num_classes=3)
    assert repr(found.network.layout) == repr(wanted)


def test_a_configuration_inherits_what_it_does_not_say(tmp_path: Path) -> None:
    plans = planned()
    plans["configurations"]["base"] = plans["configurations"].pop("3d_fullres")
    plans["configurations"]["middle"] = {"inherits_from": "base", "patch_size": [32, 16, 16]}
    plans["configurations"]["3d_fullres"] = {"inherits_from": "middle", "spacing": [2.0, 2.0, 2.0]}
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}, plans))
    assert found.window == (32, 16, 16)
    assert found.preprocessing is not None
    assert found.preprocessing.spacing == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("reader", "orientation", "axes"),
    [
        ("SimpleITKIO", None, (0, 2, 1)),
        ("NibabelIO", None, (0, 2, 1)),
        ("NibabelIOWithReorient", "RSA", None),
        ("SimpleITKIOWithReorient", "RSA", None),
    ],
)
def test_readers_decide_the_order_of_axes(
    reader: str, orientation: str | None, axes: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    plans = planned(image_reader_writer=reader, transpose_forward=[2, 0, 1])
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}, plans))
    assert found.preprocessing is not None
    assert (found.preprocessing.orientation, found.preprocessing.axes) == (orientation, axes)


@pytest.mark.parametrize("name", ["Dataset291_TotalSegmentator_part1_organs_1559subj", "Dataset850_TotalSegMRI_part1"])
def test_totalsegmentators_networks_see_canonical_axes(name: str, tmp_path: Path) -> None:
    """Its own program turns every file to RAS before nnU-Net reads it."""
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}, planned(dataset_name=name)))
    assert found.preprocessing is not None
    assert (found.preprocessing.orientation, found.preprocessing.axes) == ("SAR", None)


def test_every_normalisation_of_every_channel(tmp_path: Path) -> None:
    schemes = ["ZScoreNormalization", "ZScoreNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"]
    schemes += ["NoNormalization", "CTNormalization"]
    plans = planned(configured(normalization_schemes=schemes, use_mask_for_norm=[True, *[False] * 5]))
    layout = layout_of({"architecture": architecture()}, in_channels=6, num_classes=3)
    (found,) = from_nnunet(write_results(tmp_path, {"0": NnUNet(layout).state_dict()}, plans, described(channels=6)))
    assert found.in_channels == 6
    assert found.preprocessing is not None
    rules = [(rule["rule"], rule["channel"]) for rule in found.preprocessing.intensity]
    assert rules == [
        ("masked_z_score", 0), ("z_score", 1), ("range", 2), ("standardize", 3), ("clip", 5), ("standardize", 5),
    ]  # fmt: skip
    assert Preprocessing.from_dict(json.loads(json.dumps(found.preprocessing.to_dict()))) == found.preprocessing


def test_windows_are_placed_as_nnunet_does_and_its_mirrors_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mirroring costs eight times the work, so it is the user's to choose."""
    with caplog.at_level("WARNING", "ptq3d"):
        (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}))
    assert (found.blending, found.overlap) == ("nnunet", 0.5)
    (record,) = caplog.records
    assert "deploy with --tta xyz to do the same at 8 times the work" in record.message


@pytest.mark.parametrize("shape", [(20, 37, 16), (16, 16, 16), (13, 33, 50)])
@pytest.mark.parametrize("letters", ["", "xz"])
def test_answers_are_those_of_nnunets_own_predictor(tmp_path: Path, shape: Size, letters: str) -> None:
    """Windows, padding, Gaussian and mirrors; in corners its float16 weights and sums hold one or two bits."""
    module = library("nnunetv2.inference.predict_from_raw_data")
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}))
    network = found.network
    assert isinstance(network, torch.nn.Module)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    theirs = module.nnUNetPredictor(device=torch.device("cpu"), use_mirroring=True, perform_everything_on_device=False)
    theirs.network, theirs.allowed_mirroring_axes = network, tuple(map("xyz".index, letters)) or None
    theirs.configuration_manager = SimpleNamespace(patch_size=WINDOW)
    theirs.label_manager = SimpleNamespace(num_segmentation_heads=3)
    wanted = theirs.predict_sliding_window_return_logits(image).float()
    assert found.overlap is not None
    windowing = Windowing(WINDOW, found.overlap, blending=found.blending)
    answer = blend(image, lambda windows: (mirrored(network, window, letters) for window in windows), windowing)
    clear = weights_of_windows(shape, found.overlap) >= 1e-3
    assert clear.float().mean() > 0.4
    assert (answer - wanted).abs().amax(0)[clear].max() <= 2e-3 * (wanted.max() - wanted.min())
    assert (answer.argmax(0) == wanted.argmax(0))[clear].float().mean() >= 0.999


def weights_of_windows(shape: Size, overlap: float) -> torch.Tensor:
    """The sum of the weights of all windows, on every voxel of a volume."""
    padded = [max(size, side) for size, side in zip(shape, WINDOW, strict=True)]
    total = torch.zeros(padded)
    for x, y, z in even_starts(shape, WINDOW, overlap):
        total[x : x + WINDOW[0], y : y + WINDOW[1], z : z + WINDOW[2]] += nnunet_importance(WINDOW)
    before = [(large - size) // 2 for large, size in zip(padded, shape, strict=True)]
    x, y, z = (slice(first, first + size) for first, size in zip(before, shape, strict=True))
    return total[x, y, z]


def mirrored(network: torch.nn.Module, window: torch.Tensor, letters: str) -> torch.Tensor:
    """The mean over mirror images, as `ptq3d.engines.joined` takes it."""
    axes = ["xyz".index(letter) + 1 for letter in letters]
    flips = [list(chosen) for size in range(len(axes) + 1) for chosen in combinations(axes, size)]
    with torch.inference_mode():
        return torch.stack([network(window.flip(flip)[None])[0].flip(flip) for flip in flips]).mean(0)


def test_folds_are_found_or_chosen(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours(0), "1": ours(1), "all": ours(2)})
    (folder / "fold_2").mkdir()
    names = [one.files[0].parent.name for one in from_nnunet(folder)]
    assert names == ["fold_0", "fold_1", "fold_all"]
    chosen = from_nnunet(folder, folds=["all", 1])
    assert [one.files[0].parent.name for one in chosen] == ["fold_all", "fold_1"]
    for one, seed in zip(chosen, (2, 1), strict=True):
        for name, value in ours(seed).items():
            assert torch.equal(one.network.state_dict()[name], value)
    with pytest.raises(FileError, match=r"fold_2\. Folds that have it: fold_0, fold_1, fold_all"):
        from_nnunet(folder, folds=[0, 2])
    with pytest.raises(FileError, match=r"other checkpoints: checkpoint_final\.pth"):
        from_nnunet(folder, checkpoint="checkpoint_best.pth")


def test_a_folder_around_one_training_will_do_but_not_around_two(tmp_path: Path) -> None:
    plans = planned()
    plans["configurations"]["3d_lowres"] = configured(spacing=[3.0, 3.0, 3.0])
    folder = write_results(tmp_path / "results" / "Dataset999_Made", {"0": ours()}, plans)
    for around in (folder.parent, folder.parent.parent):
        assert len(from_nnunet(around)) == 1
    other = write_results(tmp_path / "other", {"0": ours()}, plans, init_args={"configuration": "3d_lowres"})
    other.rename(folder.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres"))
    with pytest.raises(OptionError, match=r"holds 2 trainings: nnUNetTrainer__nnUNetPlans__3d_fullres, .*3d_lowres"):
        from_nnunet(folder.parent)
    (low,) = from_nnunet(folder.parent, configuration="3d_lowres")
    assert low.preprocessing is not None
    assert low.preprocessing.spacing == (3.0, 3.0, 3.0)
    with pytest.raises(CheckpointError, match="was trained as '3d_fullres', '3d_lowres' is wanted"):
        from_nnunet(folder, configuration="3d_lowres")


def test_the_checkpoint_says_the_configuration_where_the_folder_does_not(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours()}).rename(tmp_path / "mine")
    assert len(from_nnunet(folder)) == 1
    torch.save(checkpoint_of(ours(), planned(), init_args={}), folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(OptionError, match="does not say which configuration"):
        from_nnunet(folder)


def test_labels_are_named_by_their_number_and_ignore_is_no_class(tmp_path: Path) -> None:
    dataset = {**described(), "labels": {"b": 2, "background": 0, "a": [1], "ignore": 3}}
    (found,) = from_nnunet(write_results(tmp_path, {"0": ours()}, None, dataset))
    assert found.labels == ("background", "a", "b")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1",))


def changed(key: str, value: Any) -> Callable[[], dict[str, Any]]:
    return lambda: planned(configured(**{key: value}))


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[InputError], str]] = {
    "2d": (changed("patch_size", [64, 64]), OptionError, "2D network"),
    "cascade": (changed("previous_stage", "3d_lowres"), OptionError, "cascade"),
    "network": (changed("architecture", architecture("PrimusM")), OptionError, "PrimusM"),
    "scheme": (changed("normalization_schemes", ["MyNorm"]), OptionError, "normalised by MyNorm; known here are CT"),
    "channels": (
        changed("normalization_schemes", ["NoNormalization"] * 2),
        OptionError,
        "2 channels, the data set names 1",
    ),
    "preprocessor": (changed("preprocessor_name", "Mine"), OptionError, "prepared by Mine"),
    "resampling": (changed("resampling_fn_data", "resample_torch_fornnunet"), OptionError, "resample_torch_fornnunet"),
    "order": (changed("resampling_fn_data_kwargs", {"order": 1}), OptionError, "resampled by .*'order': 1"),
    "reader": (lambda: planned(image_reader_writer="Tiff3DIO"), OptionError, "read by Tiff3DIO"),
    "window": (changed("patch_size", [18, 16, 3]), ShapeError, r"multiples of 4x4x4, got 18x16x3. .*example 20x16x4"),
    "missing": (lambda: {**planned(), "transpose_forward": None}, FileError, "damaged"),
    "absent": (lambda: {"configurations": {"3d_fullres": {}}}, FileError, "KeyError"),
    "circle": (changed("inherits_from", "3d_fullres"), OptionError, "inheritance"),
    "name": (
        lambda: planned() | {"configurations": {"2d": {}}},
        OptionError,
        "no configuration '3d_fullres'.* are: 2d",
    ),
    "no properties": (lambda: planned(foreground_intensity_properties_per_channel={}), FileError, "percentile_00_5"),
    "kernel": (changed("architecture", architecture(kernel_sizes=[[3, 3, 3]])), OptionError, "3 stages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_cannot_be_followed_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    plans, error, message = REFUSED[case]
    folder = write_results(tmp_path, {"0": ours()}, plans())
    with pytest.raises(error, match=message) as caught:
        from_nnunet(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, "'whole' is a region"),
        ({"background": 0, "a": 2, "b": 3}, "without gaps"),
        ({"background": 0, "a": 1, "b": 1}, "without gaps"),
    ],
)
def test_labels_that_no_argmax_gives_are_refused(labels: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours()}, None, {**described(), "labels": labels})
    with pytest.raises(OptionError, match=message):
        from_nnunet(folder)


def without(name: str) -> State:
    state = ours()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: without("decoder.transpconvs.1.weight"), "no 'decoder.transpconvs.1.weight'"),
        (
            lambda: ours(features_per_stage=[4, 8, 16]),
            r"'encoder.stages.2.0.convs.0.conv.weight' is \(16, 8, 3, 3, 3\)",
        ),
        (lambda: ours(n_conv_per_stage=[2, 2, 3]), "it has 'encoder.stages.2.0.convs.2.conv.weight', which"),
        (lambda: {"head.weight": torch.zeros(2)}, "no 'encoder.stages.0.0.convs.0.conv.weight'"),
    ],
)
def test_weights_of_another_network_name_the_first_tensor(
    state: Callable[[], State], message: str, tmp_path: Path
) -> None:
    folder = write_results(tmp_path, {"0": state()})
    with pytest.raises(CheckpointError, match=message):
        from_nnunet(folder)


def test_a_checkpoint_without_its_folder_is_told_to_bring_it(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours()})
    with pytest.raises(CheckpointError, match="folder of nnU-Net results"):
        load_network(folder / "fold_0" / "checkpoint_final.pth", "unet")


def test_a_checkpoint_that_needs_code_is_refused(tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours()}, optimizer_state=Payload())
    with pytest.raises(CheckpointError, match=r"needs code to load.*eval"):
        from_nnunet(folder)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_either_numpy_are_numbers(module: bytes, tmp_path: Path) -> None:
    """The pickle inside is rewritten as the other NumPy would have written it."""
    import zipfile

    folder = write_results(tmp_path, {"0": ours()})
    path, rewritten = folder / "fold_0" / "checkpoint_final.pth", tmp_path / "rewritten.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(rewritten, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray\nscalar" in content
                content = content.replace(b"numpy._core.multiarray\nscalar", module + b"\nscalar")
            target.writestr(name, content)
    content = read_checkpoint(rewritten)
    assert content["_best_ema"] == 0.8
    assert content["logging"]["train_losses"] == [0.3, 0.25]


@pytest.mark.parametrize("file", ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"])
def test_truncated_files_are_named(file: str, tmp_path: Path) -> None:
    folder = write_results(tmp_path, {"0": ours()})
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((FileError, CheckpointError)) as caught:
        from_nnunet(folder)
    assert str(path) in str(caught.value)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds plans\.json"):
        from_nnunet(tmp_path)
    with pytest.raises(FileError, match=r"holds plans\.json"):
        from_nnunet(tmp_path / "nowhere")
    folder = write_results(tmp_path, {})
    with pytest.raises(FileError, match=r"no checkpoint_final\.pth in any fold_x"):
        from_nnunet(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(FileError, match="must hold a table"):
        from_nnunet(folder)
