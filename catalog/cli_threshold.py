"""`catalog threshold`."""


def threshold() -> None:
    """Propose labels by intensities."""
