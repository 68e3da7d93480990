"""Custom graph passes: loads them, and attributes their errors to them rather than to satchel."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir

from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError
from satchel.export.python_file import run_file
from satchel.graphs.ir.contract import GraphPass, PassResult, Report, graph_pass
from satchel.graphs.ir.values import weight
from satchel.graphs.providers.findings import operator

_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")
_MODULE = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<function>\w+)")


@dataclasses.dataclass(frozen=True)
class UserPass:
    """A custom pass.

    Attributes:
        name: `module:function` or `file.py:function` without a folder, as in messages and the manifest.
        file: The Python file that defines it, if any.
        graph_pass: The pass to run; its errors are ExportErrors that name it.
    """

    name: str
    file: Path | None
    graph_pass: GraphPass


def open_passes(given: Sequence[Any]) -> tuple[UserPass, ...]:
    """Load the custom passes of an export.

    Args:
        given: Each is `module:function`, `file.py:function`, or the function itself: a `GraphPass`, an in-place edit
            `(model, report)`, or a function from a model to a `PassResult`.

    Raises:
        ExportError: The file, module or function does not exist, or is not a pass.
    """
    return tuple(one if isinstance(one, UserPass) else _open(one) for one in given)


def _open(given: Any) -> UserPass:
    if not isinstance(given, str):
        function = given.edit if isinstance(given, GraphPass) else given
        place = inspect.getmodule(inspect.unwrap(function))
        title = f"{place.__name__ if place else 'python'}:{getattr(given, 'name', getattr(given, '__name__', '?'))}"
        return _user_pass(title, title, given)
    in_file, in_module = _FILE.fullmatch(given), _MODULE.fullmatch(given)
    if in_file is not None:
        path = Path(in_file["file"])
        if not path.is_file():
            raise ExportError(f"--pass {given}: no such file; pass file.py:function with the path of your Python file")
        return _user_pass(f"{path.name}:{in_file['function']}", given, _named(_run(path, given), in_file, given))
    if in_module is not None:
        return _user_pass(given, given, _named(_import(in_module["module"], given), in_module, given))
    raise ExportError(f"--pass {given}: not a pass; use the form module:function or file.py:function")


def _run(path: Path, given: str) -> ModuleType:
    try:
        module = run_file(path, "pass")
    except Exception as error:
        raise ExportError(f"--pass {given}: cannot be run: {_told(error, path)}") from error
    if module is None:
        raise ExportError(f"--pass {given}: {path} is not a Python file")
    return module


def _import(name: str, given: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ExportError(f"--pass {given}: cannot be imported: {one_line(error)}") from error
        raise ExportError(f"--pass {given}: no module {error.name}; install it, or pass file.py:function") from None
    except Exception as error:
        raise ExportError(f"--pass {given}: cannot be imported: {_told(error, None)}") from error


def _named(module: ModuleType, match: re.Match[str], given: str) -> Any:
    found = getattr(module, match["function"], None)
    if found is None:
        raise ExportError(f"--pass {given}: it has no {match['function']}; define it, or name another function")
    return found


def _user_pass(name: str, given: str, found: Any) -> UserPass:
    if isinstance(found, GraphPass):
        edit = found.edit
    elif not callable(found):
        raise ExportError(f"--pass {given}: found {type(found).__name__}, which is not a function; name a pass")
    else:
        edit = _as_edit(found, given)
    source = inspect.getsourcefile(inspect.unwrap(edit))
    file = None if source is None else Path(source)
    return UserPass(name, file, GraphPass(name, _guarded(name, file, edit), getattr(found, "__doc__", None) or ""))


def _as_edit(function: Callable[..., Any], given: str) -> Callable[[ir.Model, Report], None]:
    """Turn a function of (model, report), or one from a model to a PassResult, into an in-place edit."""
    try:
        taken = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        taken = 0
    if taken == 2:
        return graph_pass(function).edit
    if taken != 1:
        raise ExportError(f"--pass {given}: takes {taken} arguments; a pass takes (model, report) or (model)")

    def edit(model: ir.Model, report: Report) -> None:
        result = function(model.clone())
        if not isinstance(result, PassResult):
            raise TypeError(f"it returned {type(result).__name__}; a pass must return a PassResult")
        if result.count:
            model.graph = result.model.graph
        report.count += result.count
        report.refusals += result.refusals

    edit.__wrapped__ = function  # type: ignore[attr-defined]
    return edit


def _guarded(
    name: str, file: Path | None, edit: Callable[[ir.Model, Report], None]
) -> Callable[[ir.Model, Report], None]:
    """Wrap an edit: its errors name the pass, and it must not change a weight under its old name."""

    def run(model: ir.Model, report: Report) -> None:
        before = {key: weight(value) for key, value in model.graph.initializers.items()}
        try:
            edit(model, report)
        except Exception as error:
            raise ExportError(f"--pass {name}: failed with {_told(error, file)}") from error
        for key, value in model.graph.initializers.items():
            old = before.get(key)
            if old is not None and weight(value) is not old:
                raise ExportError(
                    f"--pass {name}: changes the values of weight {key}, which other graphs share; "
                    "store the new values in a weight with a new name"
                )

    return run


def standard_only(user: UserPass, opset: int, target: str) -> GraphPass:
    """Restrict a custom pass to ONNX's standard operators at one opset, for a target that supports no others.

    The pass fails if it leaves another operator, or imports another opset.
    """

    def run(model: ir.Model, report: Report) -> None:
        user.graph_pass.edit(model, report)
        imports = model.graph.opset_imports
        said = f"--target {target} supports standard operators of opset {opset} only"
        if imports.get("") != opset:
            raise ExportError(
                f"--pass {user.name}: imports opset {imports.get('')}, but {said}; do not change the opset"
            )
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain != "" or not onnx.defs.has(node.op_type, opset, ""):
                raise ExportError(f"--pass {user.name}: leaves {operator(node)}, but {said}; express it with those")
        for domain in set(imports) - {""}:  # left behind by operators that it removed again
            del imports[domain]

    return dataclasses.replace(user.graph_pass, edit=run)


def _told(error: BaseException, file: Path | None) -> str:
    """Return the type and message of an error, and its line in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    in_file = [f for f in frames if file is not None and Path(f.filename).resolve() == file.resolve()]
    if isinstance(error, SyntaxError):
        place = f" (line {error.lineno})"
    else:
        place = f" ({Path(in_file[-1].filename).name}, line {in_file[-1].lineno})" if in_file else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"
