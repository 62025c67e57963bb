"""The errors that somebody catches; imports nothing.

    CatalogError             exit 1   anything that a user can be told in one line
    ├── UsageError           exit 2   a wrong argument
    ├── DriftError           exit 4   the schema (later: a snapshot, a split) is not the expected one
    ├── DatabaseError        exit 5   the database is out of reach, or refuses
    └── FileError            one file cannot be used; the others go on, and the command ends with exit 3

A message says where, what, so what, and what to do, in one line. It never holds the value of an identifying tag.
"""


class CatalogError(Exception):
    """Something that a user can be told in one line; `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(CatalogError):
    """An argument that cannot be right."""

    exit_code = 2


class DriftError(CatalogError):
    """What is stored differs from what was expected: here, the schema's version."""

    exit_code = 4


class DatabaseError(CatalogError):
    """The database is out of reach, or refuses what was asked."""

    exit_code = 5


class FileError(CatalogError):
    """One file cannot be used. `code` is a short stable name (``not-dicom``, ``no-pixels``, ``contour-empty``)."""

    exit_code = 3

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
