"""From any source of weights to a label map: one FP32 file equal to PyTorch, or one sentence that says why not."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer

from bundles import CT, LOADING, RAS, TYPED, UNET, inference, network, write_bundle, write_image
from networks import NETWORKS
from ptq3d.cli import main
from ptq3d.errors import GraphError, OptionError
from ptq3d.exporting import _output, export, source_of
from ptq3d.graphs.export import export_network, label_agreement, relative_error
from ptq3d.graphs.files import load_graph
from ptq3d.manifest import embedded
from ptq3d.models import build_network
from ptq3d.models.pretrained import Pretrained
from ptq3d.models.sources import from_checkpoint
from ptq3d.options import ExportOptions, QuantizeOptions
from ptq3d.quantizing import with_onnx
from ptq3d.volumes.files import load_image
from ptq3d.volumes.preprocessing import Preprocessing

RULES = 'orientation = "RAS"\n[[intensity]]\nrule = "window"\nlow = -57.0\nhigh = 164.0\n'


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1, lines
    return lines[0]


def manifest_of(path: Path) -> Any:
    return embedded(load_graph(path), where=path)


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path / "rules.toml"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(2):
        write_image(tmp_path / f"images/case{number}.nii.gz", (30, 33, 27), seed=number)
    return tmp_path / "images"


def monais_labels(folder: Path, image: Path) -> np.ndarray:
    """(X, Y, Z) classes of the file's voxels by MONAI's parser, transforms and inferer; nothing is resampled."""
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = parser.get_parsed_content("preprocessing")({"image": str(image)})["image"]
    made = network()
    inferer = SlidingWindowInferer((16, 24, 16), overlap=0.25, mode="gaussian")
    with torch.no_grad():
        labels = inferer(prepared[None].as_tensor(), made)[0].argmax(dim=0).numpy()
    turned = nib.orientations.apply_orientation(
        labels,
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(nib.load(image).affine)
        ),
    )
    return np.asarray(turned)


def test_a_bundle_becomes_an_int8_label_map_in_two_commands(tmp_path: Path, images: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", inference([*LOADING, RAS, CT, TYPED]))
    int8 = tmp_path / "net_int8.onnx"
    assert (
        main(
            [
                "quantize",
                "--bundle",
                str(folder),
                "--calibration-data",
                str(images),
                "--windows",
                "4",
                "--output",
                str(int8),
            ]
        )
        == 0
    )
    assert main(["deploy", "--onnx-path", str(int8), "--data", str(images), "--output", str(tmp_path / "int8")]) == 0
    assert manifest_of(int8).labels == ("background", "organ", "lesion")
    assert manifest_of(int8).source.keys() == {"net_fp32.onnx"}
    assert manifest_of(tmp_path / "net_fp32.onnx").source.keys() == {"model.pt", "inference.json"}
    assert (
        main(
            [
                "deploy",
                "--model",
                str(tmp_path / "net_fp32.onnx"),
                "--data",
                str(images),
                "--output",
                str(tmp_path / "fp32"),
            ]
        )
        == 0
    )
    for name in ("case0.nii.gz", "case1.nii.gz"):
        wanted = monais_labels(folder, images / name)
        found = {kind: np.asarray(nib.load(tmp_path / kind / name).dataobj) for kind in ("fp32", "int8")}
        assert (found["fp32"] == wanted).mean() >= 0.9999
        assert (found["int8"] == wanted).mean() > 0.9


def test_the_export_of_a_bundle_is_its_network_on_a_real_window(tmp_path: Path, shared: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    written = export(ExportOptions(bundle=folder, output=tmp_path / "n.onnx"))
    assert written.facts["max_relative_error"] <= 1e-3
    assert written.facts["label_agreement"] >= 0.9999
    image = manifest_of(written.path).preprocessing.apply(load_image(shared / "data/abdomen_ct/images/ct.nii.gz")).data
    x, y, z = (size // 2 for size in image.shape[1:])
    window = np.ascontiguousarray(image[None, :, x : x + 16, y : y + 24, z : z + 16])
    assert window.shape == (1, 1, 16, 24, 16)
    with torch.no_grad():
        wanted = network()(torch.from_numpy(window)).numpy()
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": window})[0]
    assert relative_error(found, wanted) <= 1e-3
    assert label_agreement(found, wanted) >= 0.9999


def test_exactly_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 2
    assert "given: none" in sentence(capsys)
    assert main(["export", "--bundle", "b", "--onnx", "n.onnx"]) == 2
    assert "given: --bundle and --onnx" in sentence(capsys)
    assert main(["quantize", "--calibration-data", "c.npy"]) == 2
    assert "--checkpoint" in sentence(capsys)
    assert main(["export", "--bundle", "b", "--net", "unet"]) == 2
    assert "--net belongs to --checkpoint, not to --bundle" in sentence(capsys)
    with pytest.raises(OptionError, match="--folds belongs to --nnunet"):
        source_of(ExportOptions(torchscript=Path("n.pt"), folds=("0",)))


def test_a_checkpoint_is_quantized_at_once(tmp_path: Path, rules: Path, images: Path) -> None:
    made = build_network("unet", num_classes=3, channels=(4, 8))
    torch.save({"model_state_dict": made.state_dict()}, tmp_path / "w.pth")
    assert main(["quantize", "--checkpoint", str(tmp_path / "w.pth"), "--net", "unet", "--window", "8", "8", "8",
                 "--preprocessing", str(rules), "--calibration-data", str(images), "--windows", "2"]) == 0  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == ["unet_fp32.onnx", "unet_int8.onnx"]
    assert manifest_of(tmp_path / "unet_int8.onnx").window == (8, 8, 8)


def test_nothing_is_exported_before_the_data_is_named(tmp_path: Path) -> None:
    options = QuantizeOptions(bundle=write_bundle(tmp_path / "b"), output_path=tmp_path / "n.onnx")
    with pytest.raises(OptionError, match="--calibration-data is missing"):
        with_onnx(options)
    with pytest.raises(OptionError, match="--retarget takes a Q/DQ file"):
        with_onnx(QuantizeOptions(bundle=tmp_path / "b", retarget="openvino"))
    assert not list(tmp_path.glob("*.onnx"))


def test_channels_come_from_the_weights(tmp_path: Path, rules: Path) -> None:
    torch.save(build_network("unet", in_channels=2, num_classes=3, channels=(4, 8)).state_dict(), tmp_path / "w.pth")
    assert from_checkpoint(tmp_path / "w.pth", "unet").in_channels == 2
    options = ExportOptions(checkpoint=tmp_path / "w.pth", net="unet", window=(8, 8, 8), preprocessing=str(rules))
    written = export(options)
    assert load_graph(written.path).graph.inputs[0].shape[1] == 2


def test_folds_become_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_nnunet(folder: Path, *, folds: Any = None, configuration: str | None = None) -> tuple[Pretrained, ...]:
        assert configuration == "3d_fullres"
        return tuple(
            Pretrained(
                torch.nn.Conv3d(1, 3, 3, padding=1),
                "nnunet",
                1,
                (folder / f"fold_{fold}/checkpoint_final.pth",),
                (16, 24, 16),
                ("background", "a", "b"),
                Preprocessing("RAS"),
            )
            for fold in folds or ("0", "3")
        )

    monkeypatch.setitem(sys.modules, "ptq3d.models.nnunet_folder", SimpleNamespace(from_nnunet=from_nnunet))
    for fold in (0, 3):
        (tmp_path / f"results/fold_{fold}").mkdir(parents=True)
        (tmp_path / f"results/fold_{fold}/checkpoint_final.pth").write_bytes(b"weights")
    source = ["--nnunet", str(tmp_path / "results"), "--configuration", "3d_fullres"]
    assert main(["export", *source, "--report", str(tmp_path / "r.json")]) == 0
    names = ["nnunet_fold0_fp32.onnx", "nnunet_fold3_fp32.onnx"]
    assert [Path(file["path"]).name for file in json.loads((tmp_path / "r.json").read_text())["files"]] == names
    assert all((tmp_path / name).is_file() for name in names)
    assert main(["export", *source, "--folds", "3", "--output", str(tmp_path / "one.onnx")]) == 0
    capsys.readouterr()
    assert main(["quantize", *source, "--calibration-data", str(tmp_path)]) == 2
    assert "holds 2 networks" in sentence(capsys)


def test_the_fold_goes_into_any_name() -> None:
    given = ExportOptions(nnunet=Path("r"), output=Path("x/n_fp32.onnx"))
    assert _output(given, Path("r/default.onnx"), "fold2") == Path("x/n_fold2_fp32.onnx")
    assert _output(ExportOptions(nnunet=Path("r")), Path("r/n.onnx"), "foldall") == Path("r/n_foldall.onnx")
    assert _output(given, Path("r/default.onnx"), "") == Path("x/n_fp32.onnx")


def test_anyones_onnx_gets_a_manifest(tmp_path: Path, rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = NETWORKS["unet"](tmp_path / "n.onnx")
    (tmp_path / "names.json").write_text(json.dumps({"labels": {str(i): f"part {i}" for i in range(5)}}))
    assert main(["export", "--onnx", str(source)]) == 2
    assert "--preprocessing" in sentence(capsys)
    assert not (tmp_path / "n_fp32.onnx").exists()
    assert (
        main(
            [
                "export",
                "--onnx",
                str(source),
                "--preprocessing",
                str(rules),
                "--label-map",
                str(tmp_path / "names.json"),
            ]
        )
        == 0
    )
    found = manifest_of(tmp_path / "n_fp32.onnx")
    assert found.labels == tuple(f"part {i}" for i in range(5))
    assert found.preprocessing == Preprocessing.load(rules)
    assert found.source.keys() == {"n.onnx"}
    assert main(["export", "--onnx", str(source), "--preprocessing", str(rules), "--output", str(source)]) == 2
    assert "overwritten" in sentence(capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["torchscript", "exported-program"])
def test_graphs_need_their_preprocessing_said(
    kind: str, tmp_path: Path, rules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, example = torch.nn.Conv3d(1, 3, 3, padding=1).eval(), torch.rand(1, 1, 16, 24, 16)
    path = tmp_path / "n.pt2"
    if kind == "torchscript":
        torch.jit.script(made).save(str(path))
    else:
        torch.export.save(torch.export.export(made, (example,)), path)
    given = ["export", f"--{kind}", str(path), "--output", str(tmp_path / "n.onnx")]
    assert main([*given, "--window", "16", "24", "16"]) == 2
    assert "--preprocessing" in sentence(capsys)
    assert main([*given, "--window", "16", "24", "16", "--preprocessing", str(rules)]) == 0
    assert manifest_of(tmp_path / "n.onnx").window == (16, 24, 16)


def test_bad_bundles_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_bundle(tmp_path / "b", inference(network_def={**UNET, "act": "$__import__('os')"}))
    assert main(["export", "--bundle", str(folder), "--output", str(tmp_path / "n.onnx")]) == 2
    assert "needs code" in sentence(capsys)
    assert not (tmp_path / "n.onnx").exists()


def test_a_window_off_the_stride_names_one_that_the_network_takes(
    tmp_path: Path, rules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bundle(tmp_path / "b")
    given = ["export", "--bundle", str(folder), "--output", str(tmp_path / "n.onnx"), "--window"]
    assert main([*given, "18", "24", "15"]) == 2
    said = sentence(capsys)
    assert "multiples of 4" in said
    assert not (tmp_path / "n.onnx").exists()
    proposed = said.rsplit("--window ", 1)[1].rstrip(".\n").split()
    assert main([*given, *proposed]) == 0
    assert manifest_of(tmp_path / "n.onnx").window == (20, 24, 16)


def test_a_network_of_one_window_is_said_to_be_one() -> None:
    class Fixed(torch.nn.Conv3d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.zeros(1, 1, 5, 7, 9)

    with pytest.raises(GraphError, match=r"windows of \(5, 7, 8\).*Nor does it take cubes.*made for one window"):
        export_network(Fixed(1, 2, 1), channels=1, window=(5, 7, 8))


def test_a_window_that_fails_in_spite_of_the_stride_is_not_proposed_again() -> None:
    class Small(torch.nn.Conv3d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.numel() > 1000:
                raise RuntimeError("not enough memory")
            return super().forward(x)

    with pytest.raises(GraphError, match=r"not enough memory\. It takes cubes of 3 voxels, though: try another"):
        export_network(Small(1, 2, 1), channels=1, window=(16, 16, 16))


def test_a_network_with_several_answers_is_refused() -> None:
    class Deep(torch.nn.Conv3d):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
            return [super().forward(x)]

    with pytest.raises(GraphError, match=r"a list; one tensor of logits.*deep supervision"):
        export_network(Deep(1, 2, 1), channels=1, window=(4, 4, 4))


def logits(*values: tuple[float, float], span: float = 100.0) -> np.ndarray:
    """(1, 2, n + 1, 1, 1): voxels of two logits each, and one that stretches the range."""
    return np.array([*values, (0.0, span)], np.float32).T[None, :, :, None, None]


def test_labels_agree_but_for_ties() -> None:
    wanted = logits((1.0, 2.0), (2.0, 1.0), (5.0, 5.0005))
    assert label_agreement(wanted, wanted) == 1
    assert label_agreement(logits((1.0, 2.0), (2.0, 1.0), (5.0005, 5.0)), wanted) == 1  # a tie: .0005 of a range of 100
    assert label_agreement(logits((1.0, 2.0), (1.4, 1.6), (5.0, 5.0)), wanted) == pytest.approx(2 / 3)
    assert label_agreement(wanted + 3.0, wanted) == 1
    assert label_agreement(np.ones((1, 1, 2, 2, 2)), np.zeros((1, 1, 2, 2, 2))) == 1


def test_an_export_that_moves_labels_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptq3d import exporting

    monkeypatch.setattr(exporting, "label_agreement", lambda found, wanted: 0.9998)
    with pytest.raises(GraphError, match="another label"):
        export(ExportOptions(bundle=write_bundle(tmp_path / "b"), output=tmp_path / "n.onnx"))
    assert not list(tmp_path.glob("*.onnx"))
