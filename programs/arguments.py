"""Makes a program's command line from its Config: one option per field, explained by the field's docstring."""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import MISSING, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Sequence

C = TypeVar("C")


def parse_config(config_class: type[C], arguments: Sequence[str] | None = None, *, about: str = "") -> C:
    """Return a Config from ``arguments``, by default the command line's.

    An invalid one ends the program with a message that says why.

    A field is an int, float, str, bool (``--flag``, ``--no-flag``) or Literal, a tuple of such, or such or None.
    """
    parser = ArgumentParser(description=about)
    hints, helps = get_type_hints(config_class), field_docs(config_class)
    for each in fields(config_class):  # pyright: ignore[reportArgumentType]  a dataclass by contract
        default = each.default
        shown = "" if default in (MISSING, None, False, ()) else f" (default: {default!r})"
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            required=default is MISSING,
            default=default,
            help=(helps.get(each.name, "") + shown).replace("%", "%%"),
            **_reading(hints[each.name]),
        )
    values = vars(parser.parse_args(arguments))
    try:
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except ValueError as error:
        parser.error(str(error))


def field_docs(config_class: type) -> dict[str, str]:
    """Return the docstring under each field of a class, without its full stop."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[before.target.id] = inspect.cleandoc(text).removesuffix(".")
                case _:
                    pass
    return docs


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of the type ``hint``."""
    arguments = get_args(hint)
    if NoneType in arguments:
        (hint,) = (argument for argument in arguments if argument is not NoneType)
        return _reading(hint)
    if get_origin(hint) is tuple:
        return {"nargs": "*", **_reading(arguments[0])}
    if get_origin(hint) is Literal:
        return {"choices": arguments}
    return {"action": BooleanOptionalAction} if hint is bool else {"type": hint}
