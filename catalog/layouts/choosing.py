"""Which layout reads which part of a tree.

A layout that is named reads all of it, and so does one whose option is given (a table, a pattern, a reader of the user's own). Else the
folders that look like a *rooted* layout's own go to it whole; of what is left, each *typed* layout takes the files that are its own,
and DICOM comes last. So a tree of several archives is taken in at once. Two layouts that fit one folder equally are a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from catalog.errors import CatalogError, UsageError
from catalog.layouts import Annotation, Entry, Found, Image, Problem, Tree, custom, dicom, idx, nifti, pattern, sunnybrook, table

ROOTED: dict[str, ModuleType] = {"sunnybrook": sunnybrook}
TYPED: dict[str, ModuleType] = {"nifti": nifti, "idx": idx, "dicom": dicom}
ASKED: dict[str, ModuleType] = {"table": table, "pattern": pattern, "reader": custom}  # by the option that each needs
LAYOUTS = ROOTED | TYPED | ASKED
DEEPEST = 3  # folders below the root in which a rooted layout is looked for


@dataclass(frozen=True)
class Part:
    """What one layout reads: everything below a folder (`prefix`, with its last /), or of what others leave what is its own."""

    name: str
    prefix: str
    why: str

    @property
    def said(self) -> str:
        """For the user."""
        return f"{self.name} ({f'{self.prefix[:-1]}: ' if self.prefix else ''}{self.why})"


def choose(tree: Tree, layout: str, options: Mapping[str, Any]) -> list[Part]:
    """Return what reads which part of a tree.

    Raises:
        CatalogError: If none fits.
        UsageError: If there is no such layout, several fit equally, or an option is missing.
    """
    given = [name for name in ASKED if options.get(name) is not None]
    if layout == "auto" and given:
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]}: choose one")
        return [Part(given[0], "", f"--{given[0]}")]
    if layout != "auto":
        if layout not in LAYOUTS:
            raise UsageError(f"--layout {layout}: there is no such layout; there is: {', '.join(LAYOUTS)}")
        if layout in ASKED and layout not in given:
            raise UsageError(f"--layout {layout}: needs --{layout}")
        return [Part(layout, "", "asked for")]
    parts: list[Part] = []
    for prefix in _folders(tree):
        if any(prefix.startswith(part.prefix) for part in parts):
            continue
        below = tree.below(prefix)
        fitting = {name: why for name, module in ROOTED.items() if (why := module.recognises(below))}
        if fitting:
            fitting |= {name: why for name, module in TYPED.items() if name != "dicom" and (why := module.recognises(below))}
        if len(fitting) > 1:
            said = " and ".join(f"{name} ({why})" for name, why in fitting.items())
            raise UsageError(f"{prefix or tree.root}: {said} fit equally; say which one by --layout")
        parts += [Part(name, prefix, why) for name, why in fitting.items()]
    rest = tree.without([part.prefix for part in parts])
    parts += [Part(name, "", why) for name, module in TYPED.items() if (why := module.recognises(rest))]
    if not parts:
        raise CatalogError(
            f"{tree.root}: no layout fits: there is no DICOM, NIfTI or IDX file in it and no link.csv beside dicoms/; point at the folder "
            f"that holds the studies, or describe it by --table or --pattern"
        )
    return parts


def read(tree: Tree, parts: list[Part], options: Mapping[str, Any]) -> Found:
    """Return what the layouts find together. A file belongs to the first that takes it."""
    whole = Found(problems=list(tree.problems), chosen=[part.said for part in parts])
    rest = tree
    for part in parts:
        below = rest.below(part.prefix)
        found = LAYOUTS[part.name].read(below, options)
        _add(whole, found, part.prefix)
        if len(parts) == 1:
            whole.left_over = found.left_over
            break
        taken = {part.prefix + item.entry.path for item in (*found.images, *found.annotations)}
        rest = rest.without([part.prefix] if part.prefix else [], taken)
        whole.left_over = whole.left_over + found.left_over if part.prefix else len(rest.entries)
    return whole


def _folders(tree: Tree) -> list[str]:
    """Return folders that may be a rooted layout's own, each with its last /, outer ones first."""
    marks = [mark for module in ROOTED.values() for mark in module.MARKS]
    marked = [entry for entry in tree.entries if any(mark in entry.path for mark in marks)]
    found = {""} if marked else set()
    for entry in marked:
        names = entry.path.split("/")[:-1][:DEEPEST]
        found.update("/".join(names[:depth]) + "/" for depth in range(1, len(names) + 1))
    return sorted(found, key=lambda prefix: (prefix.count("/"), prefix))


def _add(whole: Found, found: Found, prefix: str) -> None:
    """Add what was found below a folder, with paths from the root."""
    if not prefix:
        whole.images += found.images
        whole.annotations += found.annotations
    else:
        whole.images += [replace(image, entry=_moved(image.entry, prefix), options=_options(image, prefix)) for image in found.images]
        whole.annotations += [
            replace(
                drawn, entry=_moved(drawn.entry, prefix), candidates=tuple(prefix + path for path in drawn.candidates),
                folder=None if drawn.folder is None else prefix + drawn.folder, options=_options(drawn, prefix),
            )
            for drawn in found.annotations
        ]  # fmt: skip
    known = set(whole.problems)
    for problem in found.problems:
        moved = Problem(prefix + problem.path, problem.code, problem.message)
        if problem not in known and moved not in known:
            whole.problems.append(moved)
    whole.originals |= found.originals


def _moved(entry: Entry, prefix: str) -> Entry:
    return Entry(prefix + entry.path, entry.size, entry.mtime_ns)


def _options(item: Image | Annotation, prefix: str) -> dict[str, Any]:
    return {name: prefix + value if name == "image_path" else value for name, value in item.options.items()}
