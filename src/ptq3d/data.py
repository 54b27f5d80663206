"""The data of a verb: what --data, --labels, --split and --series name, what was found there, and which classes its labels are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ptq3d.datasets.cases import Case, read_grid
from ptq3d.datasets.dataset import Dataset, Ignored
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import InputError, LabelError, OptionError, few, numbered
from ptq3d.manifest import Manifest
from ptq3d.volumes.resample import oriented_grid

log = logging.getLogger("ptq3d")
SEEN_HEADERS = 20  # of a large set: enough to tell its spacing, and a DICOM series has hundreds of headers
BACKGROUND = "background"  # class 0, whatever it is called
FEWEST_SPELLED = 10  # classes: of fewer, spellings and other things of one organ cannot be told apart


def find_data(
    data: Path,
    labels: Path | None = None,
    *,
    split: str | None = None,
    usual: Sequence[str] = (),
    series: str | None = None,
) -> Dataset:
    """The cases that a verb works on; what was found is logged.

    Args:
        data: a volume, a DICOM series, a folder laid out as one of `LAYOUTS`, or a list of cases.
        labels: a label map or a folder of them; or the name of one of the data set's own segmentations.
        split: of the data set; "all" for every case.
        usual: the split that is taken where none is asked for: the first of these that the data set has; none for all cases.
        series: which series of DICOM files.

    Raises:
        FileError, LabelError: see `open_dataset`.
        OptionError: the data set has no such split, or names splits, but none of the usual ones.
    """
    found = open_dataset(data, labels, series=series)
    log.info("%s", described(found))
    chosen = split or _usual(found, usual)
    if chosen != "all":
        found = _split(found, chosen, data)
    return with_labels(found, labels) if labels is not None and labels.exists() else found


def _split(found: Dataset, chosen: str, data: Path) -> Dataset:
    """The cases of one split."""
    cases = tuple(case for case in found.cases if case.split == chosen)
    if not cases:
        raise OptionError(
            f"{data} has no split '{chosen}': {', '.join(found.splits) or 'it names none'}. Choose another one, or --split all."
        )
    if len(cases) < len(found.cases):
        log.info("using its %d cases of split '%s'", len(cases), chosen)
    return replace(found, cases=cases)


def _usual(found: Dataset, usual: Sequence[str]) -> str:
    """The usual split of a data set; "all" where it names none, or none is usual."""
    if not usual or not found.splits:
        return "all"
    chosen = next((one for one in usual if one in found.splits), None)
    if chosen is None:
        raise OptionError(
            f"{found.root} has no split {' or '.join(map(repr, usual))}, but {', '.join(found.splits)}; name the folder of the "
            "images you mean, or say which with --split (all for every case) where the verb has it."
        )
    return chosen


def with_labels(found: Dataset, wanted: Path | None) -> Dataset:
    """The data set where every case has labels.

    Args:
        found: to train on.
        wanted: what the user named as labels.

    Raises:
        LabelError: a case has none.
    """
    for case in found.cases:
        if case.labels is None:
            given = f"in {wanted}" if wanted is not None else "beside it; name their file or folder with --labels"
            raise LabelError(f"{case.where} has no label map {given}.")
    return found


def without_labels(found: Dataset) -> Dataset:
    """The data set as if nobody had labelled it."""
    return replace(found, cases=tuple(case.unlabelled() for case in found.cases))


def judged_by(
    found: Dataset, manifest: Manifest, *, labels: Path | None, label_map: Path | None
) -> tuple[list[Case], LabelMap]:
    """Cases with the labels that a network can be judged by, and the map from their values to its classes.

    Labels that the user names are used. Those that merely lie in the data set are used where they are of the network's
    classes, and left out, with a line that says so, where they are not.

    Args:
        found: the data.
        manifest: of the network.
        labels: what the user named as labels.
        label_map: the file that the user named.

    Raises:
        FileError, LabelError: the file is none, or has another number of classes than the network.
    """
    if label_map is not None:
        return list(found.cases), truth_map(label_map, manifest)
    if found.label_map is None:
        if labels is not None:
            return list(found.cases), LabelMap.identity(manifest.labels)
        reason = "name no classes"
    else:
        own = fitting(found.label_map, manifest.labels)
        if own is not None:
            _tell_spellings(found.label_map, own)
            return list(found.cases), own
        reason = _other_classes(found.label_map, manifest)
        if labels is not None:
            raise LabelError(f"the labels of {found.root} {reason}; say what they are with --label-map.")
    if any(case.labels is not None for case in found.cases):
        log.info("the labels of %s %s, so there is no Dice; say what they are with --label-map", found.root, reason)
    return list(without_labels(found).cases), LabelMap.identity(manifest.labels)


def truth_map(path: Path, manifest: Manifest) -> LabelMap:
    """From the values of label files to the classes of a network, as a file says.

    Raises:
        FileError: no readable file.
        LabelError: the map has another number of classes than the network.
    """
    label_map = LabelMap.load(path)
    if len(label_map.names) != manifest.classes:
        raise LabelError(
            f"{path} names {len(label_map.names)} classes, the network gives {manifest.classes}. Give the map of this network."
        )
    return label_map


def fitting(label_map: LabelMap, names: Sequence[str]) -> LabelMap | None:
    """The label map of a data set in the order of a network's classes; None where these are other classes.

    The same names in any order fit; upper and lower case, spaces, "_" and "-", and the order of words are alike
    ("kidney_left"). So do two lists of at least ten classes in the same order whose names are spellings of one another
    ("Right-ACgG--anterior-cingulate-gyrus"): the same side and numbers, and at least half of all words. A network whose classes are
    only numbered ("class 3", "3") is taken to have them in the data set's order. Class 0 is background, whatever it is called.

    Args:
        label_map: of the data set.
        names: of the network's classes.
    """
    own, wanted = ([BACKGROUND, *map(_plain, listed[1:])] for listed in (label_map.names, names))
    if len(own) != len(wanted) or len(set(own)) < len(own):
        return None
    if sorted(own) == sorted(wanted):
        place = [wanted.index(name) for name in own]
        others = None if label_map.others is None else place[label_map.others]
        return LabelMap(tuple(names), {value: place[index] for value, index in label_map.values.items()}, others)
    differ = [(one, other) for one, other in zip(own, wanted, strict=True) if one != other]
    moved = any(one in wanted or other in own for one, other in differ)
    spelled = len(own) > FEWEST_SPELLED and not moved and all(_spellings(*pair) for pair in differ)
    return replace(label_map, names=tuple(names)) if spelled or _numbered(wanted) else None


def _spellings(one: str, other: str) -> bool:
    """Whether two names have the same side and numbers, and at least half of all their words in common."""
    first, second = set(one.split()), set(other.split())
    apart = {word for word in first ^ second if word in ("left", "right") or any(map(str.isdigit, word))}
    return not apart and 2 * len(first & second) >= len(first | second)


def _numbered(names: Sequence[str]) -> bool:
    """Whether classes behind the background have only numbers."""
    return len(names) > 1 and all(name.removesuffix(" class").isdigit() for name in names[1:])


def _tell_spellings(own: LabelMap, taken: LabelMap) -> None:
    """Say which classes are taken for one another though their names differ."""
    if _numbered([_plain(name) for name in taken.names]):
        log.info(
            "the network's classes have no names: they are taken in the order of the data set (%s, ...)", own.names[1]
        )
        return
    if {_plain(name) for name in own.names[1:]} != {_plain(name) for name in taken.names[1:]}:
        pairs = zip(own.names[1:], taken.names[1:], strict=True)
        told = [f"{one} = {other}" for one, other in pairs if _plain(one) != _plain(other)]
        log.warning("taken for the same classes, by their order and most of their words: %s", few(told))


def _other_classes(label_map: LabelMap, manifest: Manifest) -> str:
    """How the classes of a data set differ from a network's, as the end of a sentence about its labels."""
    if len(label_map.names) != manifest.classes:
        return f"are of {len(label_map.names)} classes (the network has {manifest.classes})"
    known = {_plain(name) for name in manifest.labels}
    others = [name for name in label_map.names[1:] if _plain(name) not in known]
    return f"are of other classes than the network's: {few(others)}"


def _plain(name: str) -> str:
    """A name without what people write differently: TotalSegmentator's kidney_left is BTCV's left kidney."""
    return " ".join(sorted(name.casefold().replace("_", " ").replace("-", " ").split()))


def described(found: Dataset) -> str:
    """One line: layout, cases, classes, channels, spacing, and what was left out."""
    parts = [f"{found.layout} ({found.root}): {numbered(len(found.cases), 'case')}"]
    if found.splits:
        counts = Counter(case.split or "without split" for case in found.cases)
        parts[0] += f" ({', '.join(f'{number} {split}' for split, number in counts.items())})"
    parts.append(_labelled(found))
    if (channels := found.cases[0].channels) > 1:
        parts.append(f"{channels} channels" + (f" ({', '.join(found.channels)})" if found.channels else ""))
    parts += [f"spacing {spacing}" for spacing in _spacings(found.cases)]
    if found.ignored:
        parts.append(f"{numbered(len(found.ignored), 'file')} ignored ({'; '.join(_reasons(found.ignored))})")
    return ", ".join(parts)


def _reasons(ignored: Sequence[Ignored]) -> Iterator[str]:
    """What was left out, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for one in ignored:
        by_reason.setdefault(one.reason, []).append(one.path.name)
    for reason, names in by_reason.items():
        yield f"{reason}: {few(names)}"


def _labelled(found: Dataset) -> str:
    number = sum(case.labels is not None for case in found.cases)
    if not number:
        return "no labels"
    of = "" if found.label_map is None else f" of {len(found.label_map.names)} classes"
    return f"labels{of}" if number == len(found.cases) else f"labels{of} for {number} of them"


def _spacings(cases: Sequence[Case]) -> Iterator[str]:
    """The range of spacings along right-left, anterior-posterior, superior-inferior; nothing where no header can be read."""
    seen = []
    for case in cases[:: max(1, len(cases) // SEEN_HEADERS)]:
        with suppress(InputError):  # the verb that reads the case will say what is wrong with it
            affine = oriented_grid(read_grid(case), "RAS")[1]
            seen.append(np.linalg.norm(affine[:3, :3], axis=0))
    if seen:
        ends = zip(np.min(seen, axis=0), np.max(seen, axis=0), strict=True)
        yield (
            " x ".join(f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g}-{high:.3g}" for low, high in ends)
            + " mm"
        )
