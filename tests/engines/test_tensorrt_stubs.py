"""The TensorRT engine against type stubs of real bindings: every attribute, enum, argument and type that it uses is there.

The stubs are made by tools/tensorrt_stubs.py; the type checker is basedpyright, which is pyright with its program inside the wheel.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import fake_tensorrt
import ptq3d
from fake_tensorrt import Machine

STUBS = Path(__file__).parents[1] / "stubs"
VERSIONS = sorted(folder.name.removeprefix("tensorrt-") for folder in STUBS.glob("tensorrt-*"))
SOURCE = Path(ptq3d.__file__).parent / "engines"
FILES = ("tensorrt.py", "tensorrt_engine.py")
# what is wrong, in which file, the line as it is, as it is planted, the versions that have it nonetheless
PLANTED = [
    ("attribute of a config", 0, "config.progress_monitor =", "config.progress_monitors =", ()),
    ("enum", 0, "trt.BuilderFlag.TF32", "trt.BuilderFlag.TENSOR_FLOAT", ()),
    ("enum of TensorRT 10 only", 0, "trt.BuilderFlag.TF32", "trt.BuilderFlag.INT8", ("10.3.0", "10.16.1.11")),
    ("missing argument", 0, "trt.Runtime(logger)", "trt.Runtime()", ()),
    ("argument of another name", 0, "ignore_mismatch=False", "ignore_mismatches=False", ()),
    ("argument of another type", 0, "trt.OnnxParser(network, logger)", "trt.OnnxParser(builder, logger)", ()),
    ("attribute that is a method", 0, "error.desc()", "error.desc.upper()", ()),
    ("function of an older version", 1, ".execute_async_v3(", ".execute_async_v2(", ()),
    ("property that 11 removed", 1, "device_memory_size_v2", "device_memory_size", ("10.3.0", "10.16.1.11")),
    ("type of a result", 1, "shape[axis] for", "shape[axis].size for", ()),
]


def planted(index: int) -> str:
    _, file, right, wrong, _ = PLANTED[index]
    source = (SOURCE / FILES[file]).read_text()
    assert source.count(right) >= 1, f"nothing says {right}"
    return source.replace(right, wrong)


@cache
def errors(version: str, folder: Path) -> Counter[str]:
    """File -> errors of the type checker; as they are under their own names, planted ones as p0.py, p1.py, ..."""
    pytest.importorskip("basedpyright")
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text((SOURCE / name).read_text())
    for index in range(len(PLANTED)):
        (folder / f"p{index}.py").write_text(planted(index))
    settings = {
        "include": [str(folder)],
        "stubPath": str(STUBS / f"tensorrt-{version}"),
        "extraPaths": [str(SOURCE.parents[1])],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] >= len(PLANTED) + len(FILES)
    wrong = [one for one in found["generalDiagnostics"] if one["severity"] == "error"]
    return Counter({one["file"].rsplit("/", 1)[-1]: 1 for one in wrong}) + Counter()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stubs")


def test_the_oldest_and_the_newest_are_there() -> None:
    majors = {version.split(".")[0] for version in VERSIONS}
    assert {"10", "11"} <= majors
    assert "10.3.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engine_uses_what_there_is(version: str, scratch: Path) -> None:
    found = errors(version, scratch / version)
    assert [name for name in FILES if found[name]] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("index", range(len(PLANTED)), ids=[what for what, *_ in PLANTED])
def test_what_there_is_not_is_seen(index: int, version: str, scratch: Path) -> None:
    *_, there = PLANTED[index]
    assert (errors(version, scratch / version)[f"p{index}.py"] == 0) == (version in there)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_has_nothing_that_the_binding_has_not(version: str) -> None:
    """Classes, members, and the names and number of arguments."""
    text = (STUBS / f"tensorrt-{version}/tensorrt/__init__.pyi").read_text()
    real = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    module = ast.parse(Path(fake_tensorrt.__file__).read_text())
    binding = next(one for one in module.body if isinstance(one, ast.FunctionDef) and one.name == "binding")
    ours = [node for node in binding.body if isinstance(node, ast.ClassDef) and node.name != "Counted"]
    assert len(ours) > 15
    for node in ours:
        assert node.name in real
        _hold(node, real[node.name])
    assert set(fake_tensorrt.binding(Machine()).DataType.__members__) <= {
        name for name, _ in _members(real["DataType"])
    }


def _members(node: ast.ClassDef) -> list[tuple[str, ast.stmt]]:
    named = [(one.name, one) for one in node.body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    fields = [
        (one.target.id, one) for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    ]
    values = [
        (one.targets[0].id, one)
        for one in node.body
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)
    ]
    return named + fields + values


def _hold(ours: ast.ClassDef, real: ast.ClassDef) -> None:
    there = dict(_members(real))
    for name, member in _members(ours):
        if name.startswith("_"):
            continue
        assert name in there, f"{ours.name}.{name}"
        if isinstance(member, ast.ClassDef):
            _hold(member, there[name])
        if isinstance(member, ast.FunctionDef) and not member.decorator_list:
            forms = [one for key, one in _members(real) if key == name and isinstance(one, ast.FunctionDef)]
            arguments = [one.arg for one in member.args.args]
            assert any([one.arg for one in form.args.args][: len(arguments)] == arguments for form in forms), (
                f"{ours.name}.{name}{arguments}"
            )
