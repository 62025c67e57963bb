"""A user's own function as a transform, and what is said when it fails: one line, without pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from loaderd.arguments import Transform, TransformError, wrong

Images = NDArray[Any]  # (C, H, W) float32 or float64
Masks = NDArray[np.bool_]  # (K, H, W)
Statistics = Mapping[str, float] | None  # of the whole stream: "mean", "std", "min", "max", "p0.5", "p99.5", …

FOUND = 200  # characters of an exception's text that are shown
NUMBERS = 8  # numbers in it: two shapes, but no pixels
# What an array looks like in a text, also one that was cut off.
ARRAY = re.compile(r"\[[\s\d.,+\-eEnaif\[\]]*(?:\]|$)|b'(?:[^'\\]|\\.)*'?|b\"(?:[^\"\\]|\\.)*\"?")


@dataclass(frozen=True)
class User(Transform):
    """Call a function of the user's: ``function(images, masks, rng, **arguments)``, after the geometry like all transforms here.

    It changes images (C, H, W) float and masks (K, H, W) bool in place, or returns both in the same shapes; it must not keep them. What it
    draws from `rng` belongs to the sample, what it draws from anywhere else does not. Its fault ends the stream: `TransformError`.

    Attributes:
        function: "package.module:function", importable by the decode workers: installed, or in a folder of PYTHONPATH.
        arguments: What it is given by name besides; anything that JSON knows.
    """

    name: ClassVar[str] = "user"
    function: str
    arguments: Mapping[str, Any] | None = None

    def check(self) -> None:
        module, _, function = self.function.partition(":") if isinstance(self.function, str) else ("", "", "")
        if not all(one.isidentifier() for one in (*module.split("."), function)):
            raise wrong(self, "function", "'package.module:function'")
        if module == "__main__":
            raise wrong(self, "function", "in a module that other processes can import, which __main__ is not")
        try:
            arguments = _as_json(self.arguments) if self.arguments else None
        except (TypeError, ValueError, RecursionError):
            raise wrong(self, "arguments", "a mapping of what JSON knows: text, finite numbers, lists, mappings") from None
        if arguments is not None and not (isinstance(arguments, dict) and all(isinstance(one, str) for one in self.arguments or ())):
            raise wrong(self, "arguments", "a mapping from names to values")
        self.replace("arguments", arguments)

    def resolve(self) -> Callable[..., Any]:
        """Import the function. Raises TransformError where this process cannot."""
        return _imported(self.function)

    def apply(self, images: Images, masks: Masks, rng: np.random.Generator, statistics: Statistics) -> None:
        function = self.resolve()
        try:
            returned = function(images, masks, rng, **(self.arguments or {}))
        except (Exception, SystemExit) as error:
            raise TransformError(f"user: {self.function}: {_said(error)}") from None
        if returned is None:
            return
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise TransformError(f"user: {self.function}: returned a {type(returned).__name__}; it must return (images, masks), or nothing")
        for what, given, place, kinds in zip(("images", "masks"), returned, (images, masks), ("fiub", "biu"), strict=True):
            if given is place:
                continue
            if not isinstance(given, np.ndarray) or given.shape != place.shape or given.dtype.kind not in kinds:
                found = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
                raise TransformError(f"user: {self.function}: returned {found} as {what}, which must be {place.dtype} {place.shape}")
            place[...] = given


def _as_json(given: object) -> Any:
    """Return what comes back of this from a jsonb column, which knows neither -0.0 nor NUL and writes large floats as whole numbers."""
    text = json.dumps(given, allow_nan=False, ensure_ascii=False)
    if "\\u0000" in text or not text.encode():  # half a character cannot be encoded, which is a ValueError
        raise ValueError
    return json.loads(text, parse_float=lambda number: int(float(number)) if abs(float(number)) >= 1e16 else float(number) + 0.0)


@cache
def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise TransformError(f"user: {path}: its module could not be imported: {_said(error)}") from None
        raise TransformError(
            f"user: {path}: the decode workers find no module {error.name}; install it, or start with its folder in PYTHONPATH "
            "(neither the script's folder nor the current one is searched)"
        ) from None
    except (Exception, SystemExit) as error:
        raise TransformError(f"user: {path}: its module could not be imported: {_said(error)}") from None
    if not callable(function):
        raise TransformError(f"user: {path}: the module {module} has no function {name}")
    found: Callable[..., Any] = function
    return found


def _said(error: BaseException) -> str:
    """Return type and text of an exception in one line, and where it was raised; no arrays and not many numbers, which may be pixels."""
    try:
        text = ARRAY.sub("[…]", " ".join(str(error).split()))
    except Exception:  # a user's class may fail here, too
        text = ""
    numbers = list(re.finditer(r"\d+", text))
    if len(numbers) > NUMBERS:
        text = text[: numbers[NUMBERS].start()] + "…"
    text = text if len(text) <= FOUND else text[:FOUND] + "…"
    text = text if text.isprintable() else ascii(text)
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno})" if last is not None else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"
