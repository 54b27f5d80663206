"""Type stubs of TensorRT's Python bindings, made from the bindings themselves.

    pip install pybind11-stubgen
    python tools/tensorrt_stubs.py 10.3.0 10.16.1.11 11.4.0.106 --output tests/stubs

TensorRT itself is not needed, nor a GPU: pip has the bindings as a package of their own, and they import beside stand-ins for
the three libraries they load, whose functions do nothing. What is called in the bindings then fails, but every class, enum and
signature can be read. tests/test_tensorrt_stubs.py holds the TensorRT engine against the stubs. Only what is reached from the
names that an engine begins with is written, without the layers of a network and without NVIDIA's texts.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "tensorrt-cu12-bindings"
MODULE = "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
ROOTS = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType",
    "ProfilingVerbosity", "OnnxParser", "OnnxParserFlag", "ParserError", "IProgressMonitor", "ILogger", "Runtime",
    "ICudaEngine", "IExecutionContext", "EngineInspector", "LayerInformationFormat", "IHostMemory", "ITimingCache",
    "IOptimizationProfile", "DataType", "TensorIOMode", "Dims", "IErrorRecorder", "__version__",
)  # fmt: skip
LEFT_OUT = re.compile(
    r"INetworkDefinition\.(add_|mark_|unmark_|get_layer)|\w+\.get_plugin_registry|\w+\.__(?!init|enter|exit|int|index|len|getitem)"
)
BUFFERS = ("IHostMemory",)  # pybind11 gives them Python's buffer protocol, which no signature shows


def main() -> None:
    """Write `<output>/tensorrt-<version>/tensorrt/__init__.pyi` for every version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    for version in options.versions:
        with tempfile.TemporaryDirectory() as scratch:
            text = tidied(raw_stubs(version, Path(scratch)), version)
        file = options.output / f"tensorrt-{version}" / "tensorrt/__init__.pyi"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(f"{file}: {len(text.splitlines())} lines")


def raw_stubs(version: str, scratch: Path) -> str:
    """What pybind11-stubgen reads out of the bindings of that version."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, f"{PACKAGE}=={version}"], check=True)
    for wheel in scratch.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(scratch)
    stand_ins(scratch, version.split(".")[0])
    found = {"PYTHONPATH": str(scratch), "LD_LIBRARY_PATH": str(scratch)}
    stubgen = Path(sys.executable).with_name("pybind11-stubgen")
    arguments = ["--ignore-all-errors", "--print-invalid-expressions-as-is", "--output-dir", str(scratch / "stubs")]
    subprocess.run([stubgen, *arguments, MODULE], check=True, env={**os.environ, **found}, capture_output=True)
    return (scratch / "stubs" / MODULE / f"{MODULE.removesuffix('_bindings')}.pyi").read_text()


def stand_ins(folder: Path, major: str) -> None:
    """Libraries by the names that the bindings ask for, with functions that return nothing."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", folder / file, source], check=True)


def tidied(text: str, version: str) -> str:
    """Stubs that a type checker reads: valid Python, names in place of C++ ones, only what `ROOTS` reach."""
    text = re.sub(r"\b(?:\w+::)+I?(\w+)", lambda found: _known(found, text), text)
    module = ast.parse("\n".join(map(_valid, text.splitlines())))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    for node in [one for one in ast.walk(module) if isinstance(one, ast.ClassDef)]:
        _tidy(node)
    wanted = _reached(classes, ROOTS)
    kept = [
        node for node in module.body if _is_import(node) or (isinstance(node, ast.ClassDef) and node.name in wanted)
    ]
    for node in kept:
        _without_texts(node)
    head = f"# TensorRT {version}, made by tools/tensorrt_stubs.py; do not edit.\n"
    body = re.sub(r":\n +\.\.\.$", ": ...", ast.unparse(ast.Module(kept, [])), flags=re.MULTILINE)
    body = re.sub(r"\n\n( +\S)", r"\n\1", body)
    if "typing_extensions." in body and "import typing_extensions" not in body:
        body = body.replace("import typing\n", "import typing\nimport typing_extensions\n", 1)
    return f"{head}{body}\n\n__version__: str\n"


def _known(found: re.Match[str], text: str) -> str:
    """nvonnxparser::IParserError -> ParserError: the class is called so in Python, with or without its I."""
    for name in (found.group(0).rpartition(":")[2], found.group(1)):
        if re.search(rf"^class {name}\b", text, re.MULTILINE):
            return name
    return "typing.Any"


def _valid(line: str) -> str:
    """A signature that is no Python, such as one with an argument called `in`, as one that takes everything."""
    found = re.match(r"(\s*def \w+)\(.*\).*:$", line)
    if found is None:
        return line
    try:
        ast.parse(f"{line.strip()} ...")
    except SyntaxError:
        return f"{found.group(1)}(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:"
    return line


def _tidy(node: ast.ClassDef) -> None:
    """Leave out layers of a network; make methods of the two functions that a Python file puts into classes."""
    body: list[ast.stmt] = []
    for one in node.body:
        if isinstance(one, ast.FunctionDef):
            if LEFT_OUT.match(f"{node.name}.{one.name}"):
                continue
            if one.name in ("__enter__", "__exit__"):
                returned = "typing.Self" if one.name == "__enter__" else "None"
                one = ast.parse(f"def {one.name}(self, *args: typing.Any) -> {returned}: ...").body[0]  # type: ignore[assignment]
        body.append(one)
    if node.name in BUFFERS:
        body += ast.parse("def __buffer__(self, flags: int, /) -> memoryview: ...").body
    node.body = body


def _reached(classes: dict[str, ast.ClassDef], roots: Iterable[str]) -> set[str]:
    """The classes that these name, and those that they name."""
    reached: set[str] = set()
    waiting = [name for name in roots if name in classes]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [other for other in _named(classes[name]) if other in classes]
    return reached


def _named(node: ast.AST) -> Iterator[str]:
    return (one.id for one in ast.walk(node) if isinstance(one, ast.Name))


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _without_texts(node: ast.stmt) -> None:
    for one in ast.walk(node):
        if isinstance(one, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(one) is not None:
            one.body = one.body[1:] or [ast.Expr(ast.Constant(...))]


if __name__ == "__main__":
    main()
