"""The files of QA rules: a rule is a file ``<CODE>.sql`` with a head that says what it is, and one query that returns what fails it.

    -- title: Inner contour larger than the outer one
    -- severity: error                error, warning or info
    -- subject: pairing               file, image, annotation, pairing, series, study or patient
    -- version: 1
    -- scope: series                  or all, for a rule that compares across patients; see below
    -- means: what it means; goes on
    --   in lines that are indented
    -- do: what to do about it
    -- parameter least: 0.5 px; what it is for
    SELECT p.id AS subject_id, area AS value, 'in words, with units' AS detail FROM …
    -- not evaluated
    SELECT count(*), 'why not' FROM …

The query may return a fourth column, ``severity``, that differs from the head's. ``:least`` in it is the parameter, of its default's type.
A rule of scope ``series`` joins the table ``scope`` (series_id, study_id, patient_id): all series of the patients to look at, of all
patients or of those of whom something changed. The query after ``-- not evaluated`` counts what could not be looked at; it may be left
out. A head with ``raised by`` (ingest, loaderd, measure) and no query describes what those raise by themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from catalog.errors import UsageError

FOLDER = Path(__file__).parent / "rules"
SEVERITIES = ("error", "warning", "info")
SUBJECTS = ("file", "image", "annotation", "pairing", "series", "study", "patient")
HEAD = re.compile(r"--\s?(?P<key>title|severity|subject|version|scope|means|do|raised by|parameter [^:]*?)\s*:\s*(?P<value>.*)")
ALLOWED = {"severity": SEVERITIES, "subject": SUBJECTS, "scope": ("series", "all"), "raised by": ("ingest", "loaderd", "measure")}
# What is quoted, or said in a comment, is no parameter.
PARAMETER = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|(?<![:\w]):(?P<name>[a-z_][a-z_0-9]*)\b")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Value = float | bool | str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, as its file says it."""

    code: str
    title: str
    severity: str
    subject: str
    version: int
    means: str
    do: str
    scope: Literal["series", "all"]
    raised_by: str  # empty: by `catalog qa run`
    parameters: Mapping[str, Value]  # with their defaults
    said: Mapping[str, str]  # what each parameter is for
    query: str
    not_evaluated: str
    path: Path


def load(folders: Sequence[Path] = ()) -> dict[str, Rule]:
    """Return the rules by code: our own, and those in these folders.

    Raises:
        UsageError: If a folder cannot be read, a file is no rule, or two have one code.
    """
    rules: dict[str, Rule] = {}
    for folder in (FOLDER, *folders):
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".sql" and not path.name.startswith("."))
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or "its name has a NUL byte"
            raise UsageError(f"{folder}: {said}; --rules takes a folder with .sql files in it") from None
        if folder != FOLDER and not paths:
            raise UsageError(f"{folder}: has no .sql file; --rules takes a folder with rules, CODE.sql each")
        for path in paths:
            rule = parse(path)
            if rule.code in rules:
                raise UsageError(f"{path}: there is a rule {rule.code} already ({rules[rule.code].path}); give it another name")
            rules[rule.code] = rule
    return rules


def parse(path: Path) -> Rule:
    """Return the rule in a file. Raises UsageError, with the line where there is one, if it is none."""
    if not re.fullmatch(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)*", path.stem):
        raise UsageError(f"{path}: a rule's file is named CODE.sql, in capitals, digits and hyphens, such as MASK-TINY.sql")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or 'other bytes'}") from None
    head: dict[str, str] = {}
    lines: dict[str, int] = {}
    parts: dict[str, list[tuple[int, str]]] = {"query": [], "not evaluated": []}

    def wrong(what: str, line: int = 1) -> NoReturn:
        raise UsageError(f"{path}:{line}: {what}")

    into, key = "query", ""
    for number, line in enumerate(re.split(r"\r?\n", text), 1):
        if any(letter < " " and letter != "\t" for letter in line):
            wrong("has a control character", number)
        if line.strip() == "-- not evaluated":
            if into == "not evaluated":
                wrong("-- not evaluated is there twice", number)
            into, key = "not evaluated", ""
        elif (match := HEAD.fullmatch(line.rstrip())) and not parts["query"] and into == "query":
            key = match["key"]
            if key in head:
                wrong(f"{key} is there twice", number)
            head[key], lines[key] = match["value"].strip(), number
        elif line.startswith("--   ") and key:
            head[key] = f"{head[key]} {line[2:].strip()}".strip()
        else:
            key = ""
            if line.strip() and not (line.startswith("--") and not parts[into]):
                parts[into].append((number, line))
    for needed in ("title", "severity", "subject", "means", "do"):
        if not head.get(needed):
            wrong(f"its head says no {needed}; `catalog qa rules --help` says what one is like", lines.get(needed, 1))
    for name, allowed in ALLOWED.items():
        if name in head and head[name] not in allowed:
            wrong(f"{name} is one of {', '.join(allowed)}", lines[name])
    query, not_evaluated = ("\n".join(line for _, line in parts[name]).strip().rstrip("; \n") for name in parts)
    raised_by = head.get("raised by", "")
    if bool(query) == bool(raised_by):
        wrong("needs one query, or says by whom it is raised", lines.get("raised by", 1))
    if not_evaluated and not query:
        wrong("has no query, so nothing is not evaluated", parts["not evaluated"][0][0])
    if not re.fullmatch(r"[1-9][0-9]{0,5}", head.get("version", "1")):
        wrong("its version is no whole number from 1 to 999999", lines["version"])
    parameters, said = {}, {}
    for name, value in head.items():
        if name.startswith("parameter "):
            short = name[10:].strip()
            if not re.fullmatch(r"[a-z_][a-z_0-9]{0,62}", short) or short == "enabled":
                wrong("a parameter's name is of small letters, digits and _, and not `enabled`", lines[name])
            default, _, words = value.partition(" ")
            default = default.rstrip(";")  # one without a unit
            if not default:
                wrong(f"parameter {short} has no default, such as `-- parameter {short}: 0.5 mm; what it is for`", lines[name])
            parameters[short], said[short] = default_of(default), words.strip()
    for part in parts.values():
        for name in names_in("\n".join(line for _, line in part)):
            if name not in parameters:
                wrong(f"the query has :{name}, which is no parameter of its head", next(n for n, line in part if f":{name}" in line))
    return Rule(
        path.stem, head["title"], head["severity"], head["subject"], int(head.get("version", "1")), head["means"], head["do"],
        "all" if head.get("scope") == "all" else "series", raised_by, parameters, said, query, not_evaluated, path,
    )  # fmt: skip


def names_in(query: str) -> list[str]:
    """Return the names of the parameters that a query uses."""
    return [match["name"] for match in PARAMETER.finditer(query) if match["name"]]


def bound(query: str) -> bytes:
    """Return a query with its parameters as psycopg names them."""
    return PARAMETER.sub(lambda match: f"%({match['name']})s" if match["name"] else match[0], query.replace("%", "%%")).encode()


def default_of(text: str) -> Value:
    """Return what a default in a head is: true or false, a finite number, or text."""
    for kind in (bool, float):
        if (value := as_kind(text, kind)) is not None:
            return value
    return text


def as_kind(text: str, kind: type[Value]) -> Value | None:
    """Return text as a value of a type, or None if it is none."""
    if kind is bool:
        return text == "true" if text in ("true", "false") else None
    if kind is float:
        return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None
    return text or None
