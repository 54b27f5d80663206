"""A MONAI bundle, written by MONAI, is read as MONAI reads it; whatever needs its code is refused and not run."""

from __future__ import annotations

import json
import logging
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from bundles import (
    CLASSES,
    CT,
    INFERER,
    LOADING,
    RAS,
    SPACING,
    TYPED,
    UNET,
    inference,
    network,
    write_bundle,
    write_image,
)
from ptq3d.errors import CheckpointError, FileError, InputError, OptionError
from ptq3d.models import build_network, bundle
from ptq3d.models.bundle import from_bundle
from ptq3d.models.bundle_config import read_config
from ptq3d.volumes.files import load_image
from ptq3d.volumes.preprocessing import Preprocessing

KEYS = {"keys": "@image_key"}
NORMALIZE = {"_target_": "NormalizeIntensityd", **KEYS}
SCALE = {"_target_": "ScaleIntensityd", **KEYS}
PERCENTILES = {
    "_target_": "ScaleIntensityRangePercentilesd",
    **KEYS,
    "lower": 2,
    "upper": 98,
    "b_min": 0,
    "b_max": 1,
    "clip": True,
}
Change = dict[str, Any]


def with_(step: Change, **changes: Any) -> Change:
    """A step with other arguments; None leaves one out."""
    return {key: value for key, value in {**step, **changes}.items() if value is not None}


NETWORKS: dict[str, Change] = {
    "unet": UNET,
    "segresnet": {"_target_": "SegResNet", "init_filters": 8, "in_channels": 1, "out_channels": 3, "dropout_prob": 0.2},
    "dynunet": {
        "_target_": "monai.networks.nets.DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 16],
        "norm_name": "INSTANCE",
        "deep_supervision": False,
    },
}


@pytest.mark.parametrize("kind", ["json", "yaml"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_bundle_says_all_of_its_network(name: str, kind: str, tmp_path: Path) -> None:
    made = network(NETWORKS[name])
    folder = write_bundle(tmp_path / "b", inference(network_def=NETWORKS[name]), made, kind=kind)
    found = from_bundle(folder)
    image = torch.rand(1, 1, 16, 24, 16)
    with torch.no_grad():
        assert torch.equal(found.network(image), made(image))
    assert (found.in_channels, found.window, found.overlap) == (1, (16, 24, 16), 0.25)
    assert found.labels == tuple(CLASSES.values())
    assert [path.name for path in found.files] == ["model.pt", f"inference.{kind}"]
    window = {"rule": "window", "low": -57.0, "high": 164.0}
    assert found.preprocessing == Preprocessing("RAS", (1.5, 1.5, 2.0), (window,))


def test_the_same_from_a_zip(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    plain, zipped = from_bundle(folder), from_bundle(path)
    assert zipped.files == (path,)
    assert (zipped.window, zipped.labels, zipped.preprocessing) == (plain.window, plain.labels, plain.preprocessing)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, zipped.network.state_dict()[name])


def test_weights_in_a_container_and_another_configuration(tmp_path: Path) -> None:
    made = network()
    folder = write_bundle(tmp_path / "b", made=made)
    torch.save({"model": made.state_dict(), "epoch": 3}, folder / "models/model.pt")
    coarse = inference(sizes={"fine": False, "overlap": 0.5, "batch": 1})
    ConfigParser.export_config_file(coarse, folder / "configs/coarse.json")
    found = from_bundle(folder, config="coarse")
    assert found.preprocessing is not None
    assert found.preprocessing.spacing == (3.0, 3.0, 3.0)
    assert found.overlap == 0.5


def test_torchscript_takes_the_place_of_weights(tmp_path: Path) -> None:
    made = network()
    folder = write_bundle(tmp_path / "b", inference(network_def={"_target_": "scripts.mine.Net"}), made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, says torch
        torch.jit.script(made).save(str(folder / "models/model.ts"))
        (folder / "models/model.pt").unlink()
        found = from_bundle(folder)
        image = torch.rand(1, 1, 16, 24, 16)
        with torch.no_grad():
            assert torch.allclose(found.network(image), made(image), atol=1e-6)
    assert found.window == (16, 24, 16)


def test_what_is_given_goes_before_what_the_bundle_says(tmp_path: Path) -> None:
    inferer = with_(INFERER, roi_size=[-1, 16, 16])
    folder = write_bundle(
        tmp_path / "b", inference([{"_target_": "Lambdad", **KEYS, "func": "$lambda x: x"}], inferer=inferer)
    )
    mine = Preprocessing("LIA")
    found = from_bundle(folder, preprocessing=mine, window=(16, 16, 8))
    assert (found.preprocessing, found.window) == (mine, (16, 16, 8))


TRANSFORMS: dict[str, list[Change]] = {
    "ct": [RAS, SPACING, CT],
    "aligned corners": [RAS, with_(SPACING, align_corners=True), CT],
    "turned": [with_(RAS, axcodes="LIA"), SPACING, CT],
    "as stored": [CT],
    "to -1..1": [RAS, SPACING, with_(CT, b_min=-1.0, b_max=1.0)],
    "unclipped": [RAS, SPACING, with_(CT, clip=False)],
    "unclipped to 2..5": [RAS, SPACING, with_(CT, clip=None, b_min=2, b_max=5)],
    "without a target": [with_(CT, b_min=None, b_max=None, clip=None)],
    "z-score": [RAS, SPACING, NORMALIZE],
    "z-score of what is not zero": [RAS, with_(NORMALIZE, nonzero="True", channel_wise="True")],
    "z-score, then -1..1": [RAS, SPACING, NORMALIZE, with_(SCALE, minv=-1.0, maxv=1.0)],
    "0..1, then z-score": [RAS, SPACING, SCALE, NORMALIZE],
    "given z-score": [RAS, SPACING, with_(NORMALIZE, subtrahend=70.5, divisor=33.0)],
    "intensities first": [NORMALIZE, RAS, with_(SPACING, mode=None)],
    "percentiles": [RAS, SPACING, PERCENTILES],
    "percentiles to -1..1": [RAS, SPACING, with_(PERCENTILES, b_min=-1)],
    "factor": [with_(SCALE, factor=0.25) | {"minv": None, "maxv": None}],
    "other names": [with_(RAS, _target_="OrientationD"), with_(SPACING, _target_="monai.transforms.SpacingDict"), CT],
}


def monais(folder: Path, image: Path) -> Any:
    """The image as MONAI's own parser and transforms prepare it."""
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.get_parsed_content("preprocessing")({"image": str(image)})["image"]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_monais(name: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", inference([*LOADING, *TRANSFORMS[name], TYPED]))
    image = write_image(tmp_path / "i.nii.gz")
    prepared = from_bundle(folder).preprocessing
    assert prepared is not None
    ours, theirs = prepared.apply(load_image(image)), monais(folder, image)
    assert ours.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-6)
    np.testing.assert_allclose(ours.data, theirs.numpy(), atol=1e-4)


def test_lists_may_be_put_together(tmp_path: Path) -> None:
    apart = inference(preprocessing={"_target_": "Compose", "transforms": "$@first + @second"})
    folder = write_bundle(tmp_path / "b", {**apart, "first": [*LOADING, RAS], "second": [SPACING, CT]})
    plain = write_bundle(tmp_path / "c")
    assert from_bundle(folder).preprocessing == from_bundle(plain).preprocessing


def test_steps_of_labels_do_not_concern_the_image(tmp_path: Path) -> None:
    both = [
        {"_target_": "LoadImaged", "keys": ["image", "label"]},
        {"_target_": "Spacingd", "keys": ["label", "image"], "pixdim": [1, 1, 1], "mode": ["nearest", "bilinear"]},
        {"_target_": "Resized", "keys": "label", "spatial_size": [3, 3, 3]},
        with_(CT, _disabled_=True),
    ]
    assert from_bundle(write_bundle(tmp_path / "b", inference(both))).preprocessing == Preprocessing(None, (1, 1, 1))


def test_a_crop_is_left_out_where_nothing_depends_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    crop = {"_target_": "CropForegroundd", **KEYS, "source_key": "@image_key", "select_fn": "$lambda x: x > 0"}
    prepared = from_bundle(write_bundle(tmp_path / "b", inference([*LOADING, RAS, SPACING, crop, CT]))).preprocessing
    assert prepared == from_bundle(write_bundle(tmp_path / "c")).preprocessing
    assert "CropForegroundd is left out" in caplog.text
    for number, later in enumerate((NORMALIZE, SPACING, SCALE)):
        folder = write_bundle(tmp_path / str(number), inference([*LOADING, RAS, crop, later]))
        with pytest.raises(OptionError, match=f"transform 5.*{later['_target_']}.*CropForegroundd leaves"):
            from_bundle(folder)


REFUSED_TRANSFORMS: dict[str, tuple[list[Change], str]] = {
    "unknown": (
        [RAS, {"_target_": "Resized", **KEYS, "spatial_size": [3, 3, 3]}],
        "transform 4 .*Resized.*--preprocessing FILE",
    ),
    "lambda": ([{"_target_": "Lambdad", **KEYS, "func": "$lambda x: x"}], "transform 3.*Lambdad"),
    "code of the bundle": ([{"_target_": "scripts.mine.Prepare", **KEYS}], r"transform 3.*scripts\.mine\.Prepare"),
    "code of anyone": ([{"_target_": "os.system", "command": "touch x"}], r"transform 3.*os\.system"),
    "splines": ([RAS, with_(SPACING, mode=3)], "Spacingd.*'mode' 3.*'bilinear'"),
    "diagonal": ([RAS, with_(SPACING, diagonal=True)], "Spacingd.*'diagonal' True"),
    "one spacing": ([RAS, with_(SPACING, pixdim=2.0)], "Spacingd.*'pixdim' 2.0"),
    "spacing kept": ([RAS, with_(SPACING, pixdim=[1.0, 1.0, -1])], "Spacingd.*'pixdim'"),
    "turned after": ([SPACING, RAS], "transform 4.*Orientationd.*behind Spacingd"),
    "twice": ([RAS, SPACING, SPACING], "transform 5.*Spacingd.*second time"),
    "both sides": ([NORMALIZE, RAS, SPACING, CT], "transform 6.*ScaleIntensityRanged.*behind Spacingd"),
    "percentiles that do not clip": ([with_(PERCENTILES, clip=False)], "ScaleIntensityRangePercentilesd.*clip"),
    "half precision": ([with_(TYPED, dtype="$torch.float16")], "EnsureTyped.*float16"),
    "integers": ([{"_target_": "CastToTyped", **KEYS, "dtype": "uint8"}], "CastToTyped.*uint8"),
    "unknown argument": ([with_(CT, soft=True)], "ScaleIntensityRanged.*'soft'"),
    "text for false": ([with_(NORMALIZE, nonzero="False")], "NormalizeIntensityd.*'nonzero' 'False'.*true"),
}


@pytest.mark.parametrize("name", REFUSED_TRANSFORMS)
def test_transforms_that_cannot_be_said_are_named(name: str, tmp_path: Path) -> None:
    steps, message = REFUSED_TRANSFORMS[name]
    folder = write_bundle(tmp_path / "b", inference([*LOADING, *steps]))
    with pytest.raises(OptionError, match=message):
        from_bundle(folder)


def test_channels_by_themselves_need_one_channel(tmp_path: Path) -> None:
    two = {**UNET, "in_channels": 2}
    steps = [*LOADING, with_(NORMALIZE, channel_wise=True)]
    folder = write_bundle(tmp_path / "b", inference(steps, network_def=two), network(two), channels=2)
    with pytest.raises(OptionError, match=r"NormalizeIntensityd.*each of 2 channels"):
        from_bundle(folder)
    folder = write_bundle(tmp_path / "c", inference([*LOADING, NORMALIZE], network_def=two), network(two), channels=2)
    assert from_bundle(folder).in_channels == 2


def touching(path: Path) -> str:
    return f"$__import__('pathlib').Path('{path}').touch()"


REFUSED: dict[str, tuple[Callable[[Path], Change], type[InputError], str]] = {
    "an expression for the network": (
        lambda ran: {"network_def": touching(ran)}, CheckpointError, "'network_def'.*__import__.*needs code"),
    "an import in the network": (
        lambda ran: {"network_def": {**UNET, "norm": "$import os"}}, CheckpointError, "'network_def::norm'.*needs code"),
    "an expression in a list": (
        lambda ran: {"network_def": {**UNET, "channels": [4, 8, touching(ran)]}}, CheckpointError, "channels::2'.*needs code"),
    "an attribute": (
        lambda ran: {"network_def": {**UNET, "act": "$torch.nn.ReLU"}}, CheckpointError, r"torch\.nn\.ReLU.*needs code"),
    "formatting": (
        lambda ran: {"network_def": {**UNET, "act": "$'%s' % 'relu'"}}, CheckpointError, "needs code"),
    "a network of the bundle": (
        lambda ran: {"network_def": {"_target_": "scripts.mine.Net"}}, CheckpointError, r"scripts\.mine\.Net.*needs code"),
    "a function of MONAI": (
        lambda ran: {"network_def": {"_target_": "monai.networks.nets.vista3d132"}}, CheckpointError, "vista3d132"),
    "any function": (
        lambda ran: {"network_def": {"_target_": "os.system", "command": f"touch {ran}"}}, CheckpointError, r"os\.system"),
    "a class from elsewhere": (
        lambda ran: {"network_def": {"_target_": "torch.nn.Identity"}}, CheckpointError, r"torch\.nn\.Identity"),
    "an object in the network": (
        lambda ran: {"network_def": {**UNET, "norm": {"_target_": "os.system"}}}, CheckpointError, r"norm.*os\.system"),
    "an argument MONAI does not know": (
        lambda ran: {"network_def": {**UNET, "img_size": 96}}, CheckpointError, "UNet.*'img_size'"),
    "arguments that fit nothing": (
        lambda ran: {"network_def": {**UNET, "strides": [2]}}, CheckpointError, "UNet cannot be made"),
    "another file": (
        lambda ran: {"network_def": "%/etc/other.json#net"}, CheckpointError, r"other\.json.*another file"),
    "a circle": (
        lambda ran: {"network_def": "@a", "a": "@b", "b": "@a"}, OptionError, "refers to itself"),
    "a circle of lists": (
        lambda ran: {"network_def": {**UNET, "channels": "@a"}, "a": ["@a"]}, OptionError, "refers to itself"),
    "a reference to nothing": (
        lambda ran: {"network_def": {**UNET, "channels": "@nowhere"}}, OptionError, "'@nowhere'.*not there"),
    "no network": (lambda ran: {"network_def": None}, CheckpointError, "'network'.*needs code"),
    "2D": (
        lambda ran: {"network_def": {**UNET, "spatial_dims": 2}}, InputError, "2 dimensions"),
    "an inferer of the bundle": (
        lambda ran: {"inferer": {"_target_": "scripts.inferer.Vista3dInferer"}}, OptionError, r"Vista3dInferer.*sliding windows"),
    "no window": (
        lambda ran: {"inferer": {**INFERER, "roi_size": [96, 96, -1]}}, OptionError, r"roi_size.*--window X Y Z"),
    "several overlaps": (
        lambda ran: {"inferer": {**INFERER, "overlap": [0.5, 0.25, 0.5]}}, OptionError, "overlap"),
    "coordinates": (
        lambda ran: {"inferer": {**INFERER, "with_coord": True}}, OptionError, "with_coord"),
    "classes that overlap": (
        lambda ran: {"postprocessing": [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]}, OptionError, "sigmoid"),
    "a threshold": (
        lambda ran: {"postprocessing": [{"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}]}, OptionError, "threshold"),
    "a published network of other sizes": (
        lambda ran: {"network_def": {"_target_": "scripts.networks.unest_base_patch_4.UNesT", "out_channels": 3, "depths": [2, 2, 2]}},
        CheckpointError, "'depths'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_code_or_cannot_be_said_is_refused(name: str, tmp_path: Path) -> None:
    change, kind, message = REFUSED[name]
    folder = write_bundle(tmp_path / "b", inference(**change(tmp_path / "ran")))
    with pytest.raises(kind, match=message) as found:
        from_bundle(folder)
    assert "inference.json" in str(found.value)
    assert not (tmp_path / "ran").exists()


def test_code_in_parts_that_are_not_needed_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    more = {
        "imports": [touching(ran)],
        "initialize": [touching(ran)],
        "handlers": [{"_target_": "os.system", "command": f"touch {ran}"}],
    }
    from_bundle(write_bundle(tmp_path / "b", inference(**more)))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1 + 2 * @three", 7), ("$-@three / 2", -1.5), ("$@three // 2 if @three > 4 else [@three % 2]", [1]), ("$not @three", False),
     ("$@list#1 == 5", True), ("$'a' + 'b'", "ab"), ("$(1, None)", [1, None]),
     ("$len(@list) + len('abc')", 5), ("$monai.utils.CommonKeys.IMAGE", "image"), ("50%", "50%"), ("a@three", "a@three")],
)  # fmt: skip
def test_plain_expressions_are_worth_what_python_says(text: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"three": 3, "list": [4, 5], "x": text}))
    config = read_config(path)
    assert config.plain(config.item("x"), "x") == value


@pytest.mark.parametrize(
    "text",
    [
        "$9**9**9",
        "$1 if",
        "$1/0",
        "$[1] * 3",
        "$f'{1}'",
        "$(lambda: 1)()",
        "$[x for x in 'a']",
        "$_0",
        "${}",
        "$len(3)",
        "$len",
        "$monai.utils",
        "$print(1)",
        "$'a' * 9",
    ],
)
def test_all_other_expressions_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"x": text}))
    with pytest.raises(CheckpointError, match="'x' is the expression"):
        read_config(path).item("x")


def test_differences_to_ptq3d_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inferer = {**with_(INFERER, mode=None), "padding_mode": "replicate"}
    steps = [
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"},
    ]
    with caplog.at_level(logging.WARNING, "ptq3d"):
        found = from_bundle(write_bundle(tmp_path / "b", inference(inferer=inferer, postprocessing=steps)))
    assert found.blending == "constant"
    for said in ("'padding_mode' replicate", "KeepLargestConnectedComponentd"):
        assert said in caplog.text
    caplog.clear()
    found = from_bundle(write_bundle(tmp_path / "c", inference(inferer={"_target_": "SimpleInferer"})))
    assert found.window == (16, 24, 16)
    assert "no sliding windows there" in caplog.text
    caplog.clear()
    assert (
        from_bundle(write_bundle(tmp_path / "d", inference(inferer={**INFERER, "cval": -1.0}))).preprocessing.outside
        == -1
    )
    assert not caplog.text


def pickled(folder: Path) -> None:
    torch.save(network(), folder / "models/model.pt")


def truncated(folder: Path) -> None:
    path = folder / "models/model.pt"
    path.write_bytes(path.read_bytes()[:3000])


def without_a_tensor(folder: Path) -> None:
    state = network().state_dict()
    del state["model.0.conv.unit0.conv.weight"]
    torch.save(state, folder / "models/model.pt")


def of_other_sizes(folder: Path) -> None:
    torch.save(network({**UNET, "channels": [6, 8, 16]}).state_dict(), folder / "models/model.pt")


def halved(folder: Path) -> None:
    path = folder / "configs/inference.json"
    path.write_text(path.read_text()[:500])


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[InputError], str]] = {
    "pickled code": (pickled, CheckpointError, r"model\.pt.*needs code"),
    "truncated weights": (truncated, CheckpointError, r"model\.pt.*truncated"),
    "a missing tensor": (
        without_a_tensor,
        CheckpointError,
        r"no 'model\.0\.conv\.unit0\.conv\.weight'.*1 tensors missing",
    ),
    "another shape": (
        of_other_sizes,
        CheckpointError,
        r"'model\.0\.conv\.unit0\.conv\.weight' is \(6, 1, 3, 3, 3\) there and \(4, 1",
    ),
    "no weights": (lambda b: (b / "models/model.pt").unlink(), FileError, r"model\.pt"),
    "half a configuration": (halved, FileError, r"inference\.json.*readable"),
    "no configuration": (
        lambda b: (b / "configs/inference.json").unlink(),
        FileError,
        r"configs/inference\.json.*metadata\.json",
    ),
    "a list": (lambda b: (b / "configs/inference.json").write_text("[1]"), FileError, r"inference\.json"),
    "half metadata": (lambda b: (b / "configs/metadata.json").write_text("{"), FileError, r"metadata\.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bundles(name: str, tmp_path: Path) -> None:
    damage, kind, message = DAMAGES[name]
    folder = write_bundle(tmp_path / "b")
    damage(folder)
    with pytest.raises(kind, match=message):
        from_bundle(folder)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        from_bundle(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no bundle"):
        from_bundle(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(FileError, match="no bundle"):
        from_bundle(tmp_path / "other.zip")


def link(archive: zipfile.ZipFile) -> None:
    member = zipfile.ZipInfo("b/configs")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(member, "/etc")


@pytest.mark.parametrize(
    "name", ["../outside.txt", "b/../../outside.txt", "/tmp/outside.txt", "..\\outside.txt", "C:\\outside.txt", "link"]
)
def test_an_archive_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in/evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b/configs/inference.json", "{}")
        if name == "link":
            link(archive)
        else:
            archive.writestr(name, "gotcha")
    with pytest.raises(FileError, match=r"refused.*Nothing was unpacked"):
        from_bundle(path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["evil.zip", "in"]


def test_truncated_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("configs/inference.json", "{}" * 1000)
    whole = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="truncated"):
        from_bundle(tmp_path / "b.zip")


def test_a_network_of_the_zoo_takes_the_place_of_a_bundles_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "scripts.networks.mine.Net"
    monkeypatch.setattr(bundle, "ZOO", {target: bundle.Known("unet", {"depth": 5})})
    made = build_network("unet", num_classes=3)
    definition = {"_target_": target, "in_channels": 1, "out_channels": 3, "depth": 5}
    found = from_bundle(write_bundle(tmp_path / "b", inference(network_def=definition), made))
    assert found.name == "unet"
    for name, value in made.state_dict().items():
        assert torch.equal(value, found.network.state_dict()[name])
