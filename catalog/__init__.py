"""What is on disk, and what is known about it: a catalog of imaging studies in PostgreSQL."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("scanfeed")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
