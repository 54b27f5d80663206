"""A MONAI bundle's configuration, read and never run: references, literals and arithmetic; whatever needs code is refused."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq3d.errors import CheckpointError, FileError, OptionError, UnavailableError

REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")
OTHER_FILE = re.compile(r"%.*\.(json|ya?ml)", re.IGNORECASE | re.DOTALL)
PLACEHOLDER = "__reference_"  # what a reference is called while its expression is parsed
DEEPEST = 32  # lists in lists: more is an item that refers to itself
LONGEST = 10_000  # characters or entries that an expression may put together

CONSTANTS: Mapping[str, str] = {
    "monai.utils.CommonKeys.IMAGE": "image",
    "monai.utils.CommonKeys.LABEL": "label",
    "monai.utils.CommonKeys.PRED": "pred",
}

Operation = Callable[[Any, Any], Any]
ARITHMETIC: Mapping[type[ast.AST], Operation] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: Mapping[type[ast.AST], Operation] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}


@dataclass(frozen=True)
class Config:
    """The items of a configuration file.

    Attributes:
        parser: MONAI's ConfigParser, which has read the file and evaluated nothing.
        path: of the file, for messages.
    """

    parser: Any
    path: Path

    def __contains__(self, name: str) -> bool:
        return name in self.parser

    def item(self, name: str) -> Any:
        """The item of an id such as "inferer" or "preprocessing::transforms", followed; None where there is none."""
        return self.follow(self.parser.get(name), name)

    def follow(self, value: Any, where: str, trail: tuple[str, ...] = ()) -> Any:
        """`value`, or what it stands for where it is a reference or an expression. Parts of a list or table stay as written.

        Args:
            value: as written.
            where: its id, for messages.
            trail: the references that led here.

        Raises:
            CheckpointError: an expression that needs code.
            OptionError: a reference to nothing, or in a circle.
        """
        if not isinstance(value, str):
            return value
        if value in trail:
            raise OptionError(f"{self.path}: '{where}' is '{value}', which refers to itself. Write its value there.")
        if value.startswith("$"):
            return self._evaluated(value, where, (*trail, value))
        reference = REFERENCE.fullmatch(value)
        return value if reference is None else self._referred(reference.group(1), where, (*trail, value))

    def plain(self, value: Any, where: str) -> Any:
        """`value` with all of its parts followed: numbers, texts, lists and tables.

        Raises:
            CheckpointError: a part needs code.
            OptionError: see `follow`.
        """
        value = self.follow(value, where)
        if where.count("::") > DEEPEST:
            raise OptionError(f"{self.path}: '{where}' has no end: it refers to itself. Write its value there.")
        if isinstance(value, list):
            return [self.plain(part, f"{where}::{index}") for index, part in enumerate(value)]
        if isinstance(value, dict):
            if "_target_" in value:
                raise CheckpointError(
                    f"{self.path}: '{where}' is made by '{value['_target_']}': refused, it needs code. Write a plain value there, or "
                    "export the network to ONNX with its own code."
                )
            return {key: self.plain(part, f"{where}::{key}") for key, part in value.items()}
        return value

    def _referred(self, name: str, where: str, trail: tuple[str, ...]) -> Any:
        if name not in self.parser:
            raise OptionError(f"{self.path}: '{where}' refers to '@{name}', which is not there. Write its value there.")
        return self.follow(self.parser[name], where, trail)

    def _evaluated(self, text: str, where: str, trail: tuple[str, ...]) -> Any:
        """An expression of literals, references and arithmetic. References are followed when their turn comes."""
        references: list[str] = []

        def placeholder(found: re.Match[str]) -> str:
            references.append(found.group(1))
            return f"{PLACEHOLDER}{len(references) - 1}"

        def look_up(name: str) -> Any:
            if not name.startswith(PLACEHOLDER):
                raise ValueError(f"'{name}'")
            return self._referred(references[int(name.removeprefix(PLACEHOLDER))], where, trail)

        if PLACEHOLDER in text:
            raise OptionError(
                f"{self.path}: '{where}' is '{text}', which holds '{PLACEHOLDER}'. Write its value there."
            )
        code = REFERENCE.sub(placeholder, text[1:]).strip()
        try:
            return _value(ast.parse(code, mode="eval").body, look_up)
        except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{self.path}: '{where}' is the expression '{text}': refused, it needs code. ptq3d reads references, literals "
                "and arithmetic and runs nothing of a bundle. Write its value there."
            ) from error


def read_config(path: Path) -> Config:
    """The items of a bundle's JSON or YAML file; nothing of it is evaluated.

    Raises:
        UnavailableError: MONAI is not installed.
        FileError: not readable.
        CheckpointError: it draws in another file.
    """
    try:
        import yaml
        from monai.bundle import ConfigParser
    except ImportError as error:
        raise UnavailableError(
            f"a MONAI bundle is read by MONAI, which is not here ({error}). Install it: pip install 'ptq3d[train]'"
        ) from error
    try:
        content = ConfigParser.load_config_files(path)
        for text in _texts(content):
            if OTHER_FILE.match(text):
                raise CheckpointError(f"{path}: '{text}' draws in another file. Write its content there.")
        parser = ConfigParser(content, globals=False)
        parser.resolve_macro_and_relative_ids()
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise FileError(
            f"{path}: not a readable configuration ({error}). It may be truncated; copy it again."
        ) from error
    return Config(parser, path)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping | list):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _texts(part)


def _value(node: ast.expr, look_up: Callable[[str], Any]) -> Any:
    """What an expression of literals, names and arithmetic is worth.

    Raises:
        ValueError: it is anything else.
    """
    match node:
        case ast.Constant(value=str() as text) if PLACEHOLDER in text:
            raise ValueError("a reference within a text")
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name():
            return look_up(node.id)
        case ast.Attribute() if ast.unparse(node) in CONSTANTS:
            return CONSTANTS[ast.unparse(node)]
        case ast.Call(func=ast.Name(id="len"), args=[part], keywords=[]):
            return len(_value(part, look_up))
        case ast.List() | ast.Tuple():
            return [_value(part, look_up) for part in node.elts]
        case ast.UnaryOp() if type(node.op) in UNARY:
            return UNARY[type(node.op)](_value(node.operand, look_up))
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return _calculated(ARITHMETIC[type(node.op)], _value(node.left, look_up), _value(node.right, look_up))
        case ast.Compare(ops=[sign], comparators=[right]) if type(sign) in COMPARISONS:
            return COMPARISONS[type(sign)](_value(node.left, look_up), _value(right, look_up))
        case ast.IfExp():
            return _value(node.body if _value(node.test, look_up) else node.orelse, look_up)
    raise ValueError(f"'{ast.unparse(node)}'")


def _calculated(operation: Operation, left: Any, right: Any) -> Any:
    """Numbers by any operation; lists and texts are only put behind one another, up to a length."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    joined = operation is operator.add and type(left) is type(right) and isinstance(left, list | str)
    if not numbers and not joined:
        raise ValueError(f"{left!r} and {right!r} are no numbers")
    if joined and len(left) + len(right) > LONGEST:
        raise ValueError(f"it grows beyond {LONGEST}")
    return operation(left, right)
