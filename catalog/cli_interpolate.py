"""`catalog interpolate`."""


def interpolate() -> None:
    """Make labels between labels."""
