"""Bad inputs of every format: each gives one clear sentence that names the file, whatever asks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broken_volumes import BAD, NAMES, made
from ptq3d.errors import InputError
from ptq3d.volumes.files import load_grid, load_image, load_labels

CASES = [(kind, name) for kind, (names, _, _) in BAD.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_is_refused_in_one_sentence_that_names_it(tmp_path: Path, kind: str, name: str) -> None:
    _, make, message = BAD[kind]
    path = make(tmp_path, name)
    with pytest.raises(InputError, match=message) as caught:
        load_image(path)
    text = str(caught.value)
    assert type(caught.value).__name__ in ("FileError", "GeometryError", "IntensityError")
    assert str(path) in text
    assert "\n" not in text
    assert len(text.replace(str(path), "")) < 600
    if type(caught.value).__name__ == "GeometryError":
        with pytest.raises(InputError, match=message):
            load_grid(path)
    with pytest.raises(InputError) as caught:  # values that are no labels, in a sound file
        load_labels(path)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_may_not_be_read(tmp_path: Path, name: str) -> None:
    path = made(tmp_path, name)
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        load_image(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_whose_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a disk or a network drive does, and as permissions do for all but root."""
    path, real = made(tmp_path, name), Path.open

    def refuse(place: Path, *given: str, **named: str) -> object:
        if place.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(place, *given, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied") as caught:
        load_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, device: str) -> None:
    (tmp_path / "a.nii").symlink_to(device)
    with pytest.raises(InputError, match="no regular file"):
        load_image(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.png", "a", "a.gz"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.nii\.gz"):
        load_image(tmp_path / name)
