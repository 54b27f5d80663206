"""What each verb takes: one frozen dataclass a verb, for Python and for the command line alike.

Field docstrings are the command line's help. Nothing heavy is imported here, so that `ptq3d --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Sizes = tuple[int, int, int]
Lengths = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes."""

    quiet: bool = False
    """Print nothing but errors."""
    report: Path | None = None
    """Write what the verb found to this JSON file."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """How a volume is segmented beside what its network's manifest says.

    Args:
        restore: how labels come back to the file's grid: "logits" resamples logits linearly, "labels" takes the nearest label.
        crop: "foreground" leaves out what lies around the box of all voxels above the image's lowest value.
        skip_empty: leave out windows of one value, which hold only padding or air; they become background.
    """

    restore: Literal["logits", "labels"] = "logits"
    crop: Literal["none", "foreground"] = "none"
    skip_empty: bool = False


@dataclass(frozen=True, kw_only=True)
class DataShowOptions(Common):
    """Say what a folder holds, by names and headers alone: layout, cases, labels, grids, and what was left out and why."""

    data: Positional[Path]
    """A data set in one of the known layouts, a folder of volumes or DICOM series, a single one, or a list of cases."""
    labels: Annotated[Path | None, arg(aliases=["--label-path"])] = None
    """Label maps, where they do not lie in the data set; or the name of one of its own segmentations."""
    series: str | None = None
    """Which DICOM series: its number, UID or a part of its description; all for every one."""


@dataclass(frozen=True, kw_only=True)
class DataCheckOptions(DataShowOptions):
    """Read every case of a data set, and say what is wrong with it: unreadable files, labels on another grid or of no class, odd
    spacings, copies, leaks between splits. Exits with 2 where anything makes the set unfit for use.
    """

    label_map: Path | None = None
    """JSON with the ids of each class in the label files, where the data set does not name them."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Look at the data before anything is done with it."""

    verb: Annotated[DataShowOptions, subcommand("show")] | Annotated[DataCheckOptions, subcommand("check")]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Common):
    """Train a network of the zoo on folders of images and labels."""

    data: Annotated[Path, arg(aliases=["--data-path"])]
    """A data set in one of the known layouts, or a folder of images."""
    labels: Annotated[Path | None, arg(aliases=["--label-path"])] = None
    """Folder of label maps, paired with the images by name; or the name of one of the data set's own segmentations."""
    split: str | None = None
    """Of the data set, or all; default: train where it has such a split."""
    model: Annotated[str, arg(aliases=["--net"])] = "unet"
    """Architecture: unet, transunet, nnunet, unest, swinunetr, segresnet, vista3d, stunet_s, stunet_b, stunet_l or stunet_h."""
    output_dir: Path = Path("runs/train")
    """Where best.ckpt, last.ckpt and the TensorBoard log go."""
    preprocessing: str = "btcv"
    """A preset (btcv) or a TOML / JSON file."""
    label_map: Path | None = None
    """JSON with class names and, if label files hold other ids, the ids of each class."""
    num_classes: int | None = None
    """Classes with background, where no label map names them; default: BTCV's 14."""
    channels: tuple[int, ...] | None = None
    """Channels of each level; default: the architecture's own."""
    spacing: Lengths | None = None
    """Voxel spacing in mm, instead of the preprocessing's."""
    window: Sizes = (96, 96, 96)
    """Training window in voxels."""
    batch_size: int = 2
    """Windows a step."""
    num_epochs: Annotated[int | None, arg(aliases=["--max-epochs"])] = None
    """Passes over the training cases; default 460 unless --max-steps is given."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    learning_rate: float = 2e-3
    """Peak of the one-cycle schedule."""
    val_fraction: float = 0.0
    """Share of the cases held out for validation; best.ckpt is then chosen by their Dice."""
    seed: int = 0
    """Equal seeds give equal runs on one machine."""
    accelerator: str = "auto"
    """cpu, gpu or auto."""
    devices: str = "auto"
    """Number of devices, or auto."""
    num_nodes: int = 1
    """Machines to train on."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of training."""
    resume: Path | None = None
    """Go on from this checkpoint of ours."""
    seed_checkpoint: bool = False
    """Also write checkpoint_epoch_N.pth, as the seed's train.py does."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Common):
    """Where a network comes from: exactly one of the first six, and what it does not say itself."""

    checkpoint: Annotated[Path | None, arg(aliases=["--pretrained-weights-path"])] = None
    """Checkpoint: ours, or a state dict with --net."""
    nnunet: Path | None = None
    """nnU-Net v2 results folder of a trainer (with plans.json, dataset.json and fold_0, ...)."""
    bundle: Path | None = None
    """MONAI bundle: its folder (with configs/ and models/) or a .zip of it. Its code is not run."""
    torchscript: Path | None = None
    """File of torch.jit.save."""
    exported_program: Path | None = None
    """File of torch.export.save, exported for one window."""
    onnx_path: Annotated[Path | None, arg(aliases=["--onnx"])] = None
    """FP32 ONNX file, ours or anyone's."""
    net: str | None = None
    """Architecture, where the checkpoint does not say."""
    num_classes: int | None = None
    """Classes with background that the checkpoint must have."""
    classes: str | None = None
    """Class prompts of a network that is told its classes (vista3d), such as 1,3,14; default: all it knows."""
    folds: tuple[str, ...] = ()
    """Folds of an nnU-Net folder, e.g. 0 1 2; default: all that are there."""
    configuration: str | None = None
    """Configuration of an nnU-Net folder (3d_fullres), or the bundle's configs/<name>.json; default: inference."""
    in_channels: int | None = None
    """Channels of a TorchScript's image; default: those of its first convolution."""
    window: Sizes | None = None
    """Window in voxels; default: the source's, or 96 96 96. An ONNX file takes another one if it is fully convolutional."""
    preprocessing: str | None = None
    """A preset (btcv) or a TOML / JSON file, where the source does not say; it is embedded in the file."""
    label_map: Path | None = None
    """JSON with class names, where the source does not say."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(SourceOptions):
    """Turn a source of weights into an FP32 ONNX file with its manifest, checked against PyTorch."""

    output: Annotated[Path | None, arg(aliases=["--onnx-file-name"])] = None
    """The ONNX file to write; default: beside the source, <name>_fp32.onnx. Several folds add _fold0, _fold1, ..."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Common):
    """Draw calibration windows from volumes into a .npy or .npz file."""

    data: Annotated[Path, arg(aliases=["--data-path"])]
    """A volume, a DICOM series, a folder or a data set in one of the known layouts; labels are not needed."""
    output: Annotated[Path, arg(aliases=["--output-path"])]
    """The .npz (with the names and hashes of the cases) or .npy file to write."""
    labels: Annotated[Path | None, arg(aliases=["--label-path"])] = None
    """Label maps: windows are then centred on labelled voxels."""
    split: str | None = None
    """Of the data set, or all; default: train where it has such a split."""
    series: str | None = None
    """Which DICOM series: its number, UID or a part of its description."""
    onnx_path: Annotated[Path | None, arg(aliases=["--onnx"])] = None
    """The network to calibrate: gives window, channels and preprocessing."""
    preprocessing: str | None = None
    """A preset (btcv) or a TOML / JSON file, where the network does not say."""
    window: Sizes | None = None
    """Window in voxels, where no network is given; default 96 96 96."""
    number: Annotated[int, arg(aliases=["--windows", "--num-samples"])] = 20
    """Windows to draw."""
    test_data: Path | None = None
    """Folder of test images: a warning names every calibration file that is among them."""
    seed: int = 0
    """Equal seeds draw equal windows."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(SourceOptions):
    """Turn an FP32 ONNX file, or any other source of weights, into a Q/DQ ONNX file with INT8 weights.

    A source that is no ONNX file is exported first, beside the output: to NAME_fp32.onnx for NAME_int8.onnx.
    """

    output_path: Annotated[Path | None, arg(aliases=["--output"])] = None
    """The Q/DQ file to write; default: <name>_int8.onnx beside the source."""
    calibration_data: Annotated[Path | None, arg(aliases=["--calibration"])] = None
    """A .npy / .npz of windows, or a folder of volumes; needed unless --retarget is given."""
    retarget: str | None = None
    """Read a Q/DQ file of anyone's and write it for this runtime, with the scales it has: no calibration."""
    split: str | None = None
    """Of the calibration data, or all; default: train where it has splits."""
    series: str | None = None
    """Which DICOM series of the calibration data: its number, UID or a part of its description; all for every one."""
    calibration_method: Literal["max", "entropy", "percentile", "mse"] = "mse"
    """How the range of an activation is drawn from what was seen."""
    equalize: bool = True
    """Scale channels so that all use the 8 bits (exact in FP32; the scales go into the weights around)."""
    second_terms: float | None = None
    """Share of the network's work that may be spent on its most sensitive layers: they read two 8-bit terms, or leave INT8.
    Default: as little of 0.2 (tensorrt, triton: 0.4) as keeps the labels of 4 calibration windows, measured on engines of it, 0, 0.02, 0.05
    and 0.2."""
    rounding: Literal["nearest", "gptq"] = "gptq"
    """How weights are rounded: each to its nearest step, or so that the layer's output errs least (and its bias is corrected)."""
    target: str = "openvino"
    """The runtime to place Q/DQ for: openvino, tensorrt, onnxruntime or triton."""
    keep: UseAppendAction[tuple[str, ...]] = ()
    """Glob pattern of layer names that stay in floating point; may be repeated."""
    number: Annotated[int, arg(aliases=["--windows"])] = 20
    """Windows to draw where a folder of volumes is given."""
    validation_data: Path | None = None
    """Volumes that were not calibrated on: the built engine's labels are compared with FP32's, and the figures go into the file."""
    validation_labels: Path | None = None
    """Their true label maps: the loss of mean Dice is then held within the budget, instead of 1 - fidelity."""
    budget: float | None = None
    """Leave as few layers as possible in floating point so that 1 - fidelity on the validation data stays within this, e.g. 0.005."""
    guard: bool = False
    """Measure whether each thin layer's INT8 makes the engine faster, and leave it in floating point where it does not."""
    quantize_mode: str = "int8"
    """Only int8 (a flag of ModelOpt's command line)."""
    high_precision_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Type of whatever is no integer, in the file; normalizations stay fp32. Default: fp16 for tensorrt and triton, else and with
    --retarget fp32."""
    seed: int = 0
    """Equal seeds draw equal windows."""


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(QuantizeOptions):
    """Measure what INT8 in each layer alone does to the answer; needs --validation-data. Writes no network."""

    figure: Path | None = None
    """Draw the bars into this PNG file."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Common):
    """Build an engine artefact from an ONNX file: a folder with the runtime's own files and a manifest with hashes."""

    onnx_path: Annotated[Path, arg(aliases=["--onnx"])]
    """FP32 or Q/DQ ONNX file."""
    output: Annotated[Path | None, arg(aliases=["--output-path"])] = None
    """The folder to make; default: <name>.<engine> beside the file."""
    engine: str = "auto"
    """openvino, onnxruntime, torch, inductor, tensorrt, triton, reference or auto."""
    device: str = "auto"
    """For an engine that is compiled for one device (tensorrt): the device, such as cuda:1."""
    precision: Precision = "fp32"
    """For an engine that is compiled (tensorrt): fp32 keeps the types that the file has, tf32 rounds what FP32 multiplies, fp16 and
    bf16 turn FP32 tensors into such."""
    batch: int = 1
    """For an engine that is compiled (tensorrt): windows that it takes at a time."""
    workspace: float | None = None
    """For an engine that is compiled (tensorrt): GB of device memory that a layer may take while it runs; default: all there is."""
    late_head: bool = True
    """With --no-late-head the last layer stays in the engine, also where `deploy` would rather run it once a voxel."""


@dataclass(frozen=True, kw_only=True)
class DeployOptions(Common):
    """Segment volumes with an engine: label maps on the original grid, Dice where labels are given."""

    model: Annotated[Path, arg(aliases=["--onnx-path", "--engine-path"])]
    """An engine folder, or an ONNX file (built once and cached)."""
    data: Annotated[Path, arg(aliases=["--data-path"])]
    """A volume, a DICOM series (folder or zip), a folder of these, a data set in one of the known layouts, or a list of cases."""
    output: Annotated[Path | None, arg(aliases=["--output-dir"])] = None
    """Folder for the label maps; default: segmentations-<model>."""
    output_type: Literal["nifti", "nrrd", "dicom_seg", "dicom_rtstruct"] = "nifti"
    """What is written; the DICOM objects refer to the series that was segmented."""
    split: str | None = None
    """Of the data set; default: all cases."""
    series: str | None = None
    """Which DICOM series: its number, UID, or a part of its description; all for every one."""
    labels: Annotated[Path | None, arg(aliases=["--label-path"])] = None
    """True label maps, for Dice."""
    label_map: Path | None = None
    """JSON with the ids of each class in the label files."""
    preprocessing: str | None = None
    """A preset (btcv) or a TOML / JSON file, for a network without a manifest, or in place of what it says (with a warning)."""
    net: str | None = None
    """For a network without a manifest: prepare volumes as the seed does for this one (unet, transunet: btcv)."""
    engine: str = "auto"
    """openvino, onnxruntime, torch, inductor, tensorrt, triton, reference or auto; an engine folder knows its own."""
    device: str = "auto"
    """The runtime's name of the device."""
    precision: Precision = "fp32"
    """Arithmetic of what the graph does not quantize."""
    providers: tuple[str, ...] = ()
    """ONNX Runtime's execution providers in their order: cpu, cuda, tensorrt, openvino. A layer that none of them takes is an error."""
    overlap: float | None = None
    """Of neighbouring windows, 0 to below 1; default: the manifest's, or 0.5."""
    threads: int = 0
    """CPU threads; 0 for all."""
    late_head: bool = True
    """With --no-late-head the logits are blended, not the fewer features in front of the last layer: same labels, more time and memory."""
    restore: Literal["logits", "labels"] = "logits"
    """How labels come back to the file's grid: from linearly resampled logits, or from the nearest label."""
    crop: Literal["none", "foreground"] = "none"
    """Segment only the box of all voxels above the image's lowest value."""
    skip_empty: bool = False
    """Leave out windows of one value, which hold only padding or air: they become background."""
    tta: str = ""
    """Mirror windows along these axes of the network's input, in all combinations, and average: x, y, z, xy, ... xyz."""
    ensemble: UseAppendAction[tuple[Path, ...]] = ()
    """A further engine or ONNX file of the same classes and window, whose logits are averaged with the model's; may be repeated."""
    max_memory: float | None = None
    """Refuse volumes for which the process would need more than this many GB, before any is segmented."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Common):
    """Measure engines side by side: size, latency, whole cases, memory, Dice, fidelity to the first."""

    models: Positional[tuple[str, ...]]
    """FP32 first. Each PATH, PATH@ENGINE, PATH@ENGINE:PRECISION or PATH@ENGINE:PRECISION:DEVICE, e.g. net.onnx@openvino:bf16."""
    data: Annotated[Path, arg(aliases=["--data-path"])]
    """A volume, a DICOM series, a folder of these, a data set in one of the known layouts, or a list of cases."""
    labels: Annotated[Path | None, arg(aliases=["--label-path"])] = None
    """True label maps; without them fidelity is still measured."""
    split: str | None = None
    """Of the data set, or all; default: test or val, where it has such a split."""
    series: str | None = None
    """Which DICOM series: its number, UID, or a part of its description; all for every one."""
    label_map: Path | None = None
    """JSON with the ids of each class in the label files."""
    preprocessing: str | None = None
    """A preset (btcv) or a TOML / JSON file, for networks without a manifest, or in place of what they say (with a warning)."""
    providers: tuple[str, ...] = ()
    """Execution providers of every onnxruntime engine, in their order: cpu, cuda, tensorrt, openvino."""
    output: Annotated[Path | None, arg(aliases=["--output-dir"])] = None
    """Keep the label maps here, one folder an engine."""
    repetitions: int = 10
    """Timed runs of one window for each engine, after two that do not count."""
    overlap: float | None = None
    """Of neighbouring windows; default: the manifest's, or 0.5."""
    threads: int = 0
    """CPU threads; 0 for all."""
    margin: float | None = None
    """With labels: say of each further engine whether its mean Dice is at most this much below the first one's."""
    tolerance: float | None = None
    """With labels: also measure surface Dice within this many mm, and HD95; needs MONAI."""
    csv: Path | None = None
    """With labels: write the scores of each engine, case and class, volumes included, to this file."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Common):
    """Score label maps against true ones: Dice, surface Dice, HD95, volumes; and whether they are no worse than others."""

    predictions: Positional[Path]
    """A label map or a folder of them; values are classes 0, 1, 2, ... where a label map is given, as in the true ones otherwise."""
    labels: Annotated[Path, arg(aliases=["--label-path"])]
    """True label maps on the same grids, of the same names or numbers."""
    reference: Path | None = None
    """Label maps of the same cases that the predictions must not be worse than, such as FP32's; with --margin."""
    margin: float | None = None
    """The largest loss of mean Dice against the reference that does not matter, e.g. 0.01."""
    label_map: Path | None = None
    """JSON with class names and, if the true label maps hold other ids, the ids of each class; without it classes are the values."""
    tolerance: float | None = 1.0
    """Of surface Dice, in mm; None leaves out surface Dice and HD95, which need MONAI."""
    csv: Path | None = None
    """Write the scores of each case and class to this file."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Common):
    """Say what a file is: manifest, layers, precision, multiply-accumulates, size. Runs nothing."""

    path: Positional[Path | None] = None
    """An ONNX file, an engine folder or a calibration file; without it, the engines of this machine."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Common):
    """The whole pipeline on made-up CT phantoms: train, export, calibrate, quantize, build, deploy, compare."""

    output_dir: Path = Path("demo-output")
    """Where everything goes."""
    data_only: Path | None = None
    """Only write a BTCV-layout folder of phantoms here."""
    train_cases: int = 16
    """Phantoms to train on."""
    test_cases: int = 4
    """Phantoms held out."""
    max_steps: int | None = None
    """Training steps; default: enough for the demo's Dice."""
    seed: int = 1
    """Equal seeds make equal phantoms and runs; seed 0 is the one that the demo's settings were tuned on."""
