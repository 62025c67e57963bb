"""`catalog export`."""


def export() -> None:
    """Write a snapshot's samples."""
