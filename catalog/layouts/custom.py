"""A reader of the user's own, for what no other layout fits: a function named by its import path, ``module:function``.

As a layout, the function gets the `Tree` and returns a `Found`. It names files and says which belong together; it opens none::

    # ours.py, in the working folder or anywhere that Python imports from
    from pathlib import Path
    import numpy as np
    from catalog.layouts import Annotation, Found, Image, Tree
    from catalog.records import Drawn, polygon

    def read(tree: Tree) -> Found:
        found = Found()
        for entry in tree.entries:
            patient, _, name = entry.path.partition("/")
            if name.endswith(".dcm"):
                found.images.append(Image(entry, patient, sure=True))
            elif name.endswith(".npy"):
                image = entry.path.removesuffix(".npy") + ".dcm"
                found.annotations.append(Annotation(entry, structure="inner", format="ours:outline", candidates=(image,)))
            else:
                found.left_over += 1
        return found

    def outline(path: Path, options: dict) -> list[Drawn]:
        ring = np.load(path).astype(np.float64)  # (n, 2) in px
        return [Drawn("", "", "", "polygon", polygon=polygon([ring]), convention="corner")]

``catalog ingest FOLDER --reader ours:read`` takes the folder in. A ``format`` with a colon names a function for single files, which gets
the file's absolute path and the layout's options and returns an `Instance` for an `Image`, or a list of `Drawn` for an `Annotation`
(a structure or reader left empty is the `Annotation`'s). It runs in the reading processes, so it must stand in a module that they can
import; a `FileError` that it raises becomes that file's row in ``ingest_error``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from catalog.errors import CatalogError, UsageError
from catalog.layouts import Found, Tree


def recognises(tree: Tree) -> str | None:
    """None: a user's reader is asked for, never found."""
    return None


def read(tree: Tree, options: Mapping[str, Any]) -> Found:
    """Return what the function ``options["reader"]`` finds.

    Raises:
        UsageError: If there is no such function, it fails, or it returns anything but a `Found`.
    """
    spec = str(options["reader"])
    function = load(spec)
    try:
        found = function(tree)
    except CatalogError:
        raise
    except Exception as error:  # its text could hold what stands in a name or table
        raise UsageError(f"{spec}: failed with {type(error).__name__}{_line(error)}") from error
    if not isinstance(found, Found):
        raise UsageError(f"{spec}: returned {type(found).__name__}; it must return a catalog.layouts.Found")
    return found


@functools.cache
def load(spec: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names. The working folder is looked in last, so nothing in it hides a module.

    Raises:
        UsageError: If the path is none, or the module or function cannot be had.
    """
    module_name, _, name = spec.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UsageError(f"{spec}: is no import path; it must be module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"{spec}: the module needs {error.name}, which is not installed") from None
        raise UsageError(f"{spec}: there is no module {error.name}; it must lie in the working folder or on PYTHONPATH") from None
    except Exception as error:
        raise UsageError(f"{spec}: importing the module failed with {type(error).__name__}{_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{spec}: the module has {'no' if function is None else 'something that is no'} function {name}")
    return function  # type: ignore[no-any-return]


def _line(error: Exception) -> str:
    """Return where it was raised, for whoever wrote the function."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno} of {Path(error.filename or '').name}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" in line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}"
