"""nnU-Net v2's folder of results, which TotalSegmentator downloads, too: one network a fold, with all that belongs to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq3d.errors import CheckpointError, FileError, OptionError, ShapeError
from ptq3d.models.nnunet import NnUNet, without_repeats
from ptq3d.models.nnunet_plans import channels_of, find_configuration, labels_of, layout_of, preprocessing_of, window_of
from ptq3d.models.pretrained import Pretrained
from ptq3d.models.sources import check_fit, read_checkpoint, weights_of

log = logging.getLogger("ptq3d")

PLANS, DATASET = "plans.json", "dataset.json"
FOLD = "fold_"
OVERLAP = 0.5  # nnU-Net steps by half a window


@dataclass(frozen=True)
class _Results:
    """A folder of results and what its two JSON files hold."""

    folder: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str | None


def from_nnunet(
    folder: Path,
    *,
    folds: Sequence[int | str] | None = None,
    configuration: str | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> tuple[Pretrained, ...]:
    """The networks of a folder of nnU-Net's results, one a fold; several are an ensemble.

    Args:
        folder: `<trainer>__<plans>__<configuration>` with plans.json, dataset.json and fold_x, or a folder around just one.
        folds: numbers or "all"; None takes all there are.
        configuration: None takes the one in the folder's name, else the one its checkpoint names.
        checkpoint: file name in the folds.

    Raises:
        FileError: no such folder or fold, or a file in it is missing or damaged.
        CheckpointError: a checkpoint is truncated, needs code to load, or does not fit the plans.
        OptionError: several such folders, or something that cannot be done exactly here.
        ShapeError: the plans' window does not fit their network.
    """
    found = _results_folder(Path(folder), configuration)
    results = _Results(found, _json(found / PLANS), _json(found / DATASET), configuration or _named(found))
    return tuple(_pretrained(results, path) for path in _checkpoints(found, folds, checkpoint))


def _results_folder(folder: Path, configuration: str | None) -> Path:
    if (folder / PLANS).is_file():
        return folder
    found = sorted(path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{PLANS}"))
    if configuration is not None:
        found = [one for one in found if _named(one) == configuration]
    if not found:
        raise FileError(
            f"{folder}: neither it nor a folder in it holds {PLANS}. Give the folder of one training, which is called "
            "<trainer>__<plans>__<configuration>."
        )
    if len(found) > 1:
        names = ", ".join(str(one.relative_to(folder)) for one in found)
        raise OptionError(f"{folder} holds {len(found)} trainings: {names}. Give the folder of one of them.")
    return found[0]


def _named(folder: Path) -> str | None:
    """The configuration in the name of a folder of results."""
    parts = folder.resolve().name.split("__")
    return parts[2] if len(parts) == 3 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{path} is no readable JSON file: {error}. Copy the folder of results again.") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} must hold a table, got {type(values).__name__}. Copy the folder of results again.")
    return values


def _checkpoints(folder: Path, folds: Sequence[int | str] | None, checkpoint: str) -> list[Path]:
    """The files of the folds, in the order asked for."""
    there = {path.parent.name: path for path in sorted(folder.glob(f"{FOLD}*/{checkpoint}"))}
    wanted = list(there) if folds is None else [f"{FOLD}{fold}" for fold in folds]
    missing = [name for name in wanted if name not in there]
    if missing or not wanted:
        others = sorted({path.name for path in folder.glob(f"{FOLD}*/*.pth")} - {checkpoint})
        raise FileError(
            f"{folder}: no {checkpoint} in {', '.join(missing) or f'any {FOLD}x'}. Folds that have it: "
            f"{', '.join(there) or 'none'}; other checkpoints: {', '.join(others) or 'none'}."
        )
    return [there[name] for name in wanted]


def _pretrained(results: _Results, path: Path) -> Pretrained:
    """One fold's network; what its plans say is refused or named damaged with the file it stands in."""
    content = read_checkpoint(path)
    name = _configuration(results, content, path)
    where = results.folder / PLANS
    try:
        found = find_configuration(results.plans, name)
        labels, channels = labels_of(results.dataset), channels_of(results.dataset)
        layout = layout_of(found, in_channels=channels, num_classes=len(labels))
        window, preprocessing = window_of(found, layout), preprocessing_of(results.plans, found, channels=channels)
        network = NnUNet(layout)
    except (OptionError, ShapeError) as error:
        raise type(error)(f"{results.folder}, configuration '{name}': {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FileError(
            f"{where} or {DATASET} beside it is damaged or of another version ({error!r}). Copy the folder again."
        ) from error
    state = without_repeats(weights_of(content, path))
    check_fit(state, network.state_dict(), path=path, name=f"the network in {where}")
    network.load_state_dict(state, strict=False)  # see `load_network`
    files = (path, where, results.folder / DATASET)
    kind = "nnunet_resenc" if layout.residual else "nnunet"
    _tell_of_mirrors(content, path)
    return Pretrained(network.eval(), kind, channels, files, window, labels, preprocessing, OVERLAP, "nnunet")


def _tell_of_mirrors(content: Mapping[str, Any], path: Path) -> None:
    """nnU-Net's predictor mirrors windows without being asked; here it is the user's choice, since it costs up to eight times."""
    axes = content.get("inference_allowed_mirroring_axes")
    if isinstance(axes, Sequence) and axes and all(axis in (0, 1, 2) for axis in axes):
        letters = "".join("xyz"[axis] for axis in axes)
        log.warning(
            "%s: nnU-Net's predictor also averages over mirrored windows unless told otherwise; deploy with --tta %s to do the same "
            "at %d times the work.",
            path,
            letters,
            2 ** len(letters),
        )


def _configuration(results: _Results, content: Mapping[str, Any], path: Path) -> str:
    arguments = content.get("init_args")
    trained = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    name = results.configuration or trained
    if name is None:
        raise OptionError(f"{path} does not say which configuration of {PLANS} it is. Name it, such as 3d_fullres.")
    if trained not in (None, name):
        raise CheckpointError(f"{path}: was trained as '{trained}', '{name}' is wanted. Give the folder of '{name}'.")
    return str(name)
