"""What is on disk, and what is known about it: a catalog of imaging studies in PostgreSQL."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Return `__version__` once it is asked for: that takes 0.05 s, which a reading process does not need."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata

        try:
            return metadata.version("scanfeed")
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
