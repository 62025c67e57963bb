"""`loaderd sequence`: digits side by side, as one picture or as a large set."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from catalog.errors import UsageError
from catalog.output import AsJson, DatabaseUrl, print_json, progress

CONFIG = {"image": ("transform",), "spacing": ("type", "subtype")}
KEYS = (*CONFIG, "output_format")
FORMATS = ("png", "jpg", "jpeg")


def sequence(
    digits: Annotated[
        str | None, typer.Argument(metavar="[DIGITS]", help="Such as 0123456789; left out with --count.", show_default=False)
    ] = None,
    spacing: Annotated[str, typer.Option(metavar="MIN:MAX", help="Narrowest and widest gap in px.")] = "0:20",
    width: Annotated[
        int | None, typer.Option(metavar="PX", help="Of the image, exact; by default what the gaps give.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="variable|fixed", help="Gaps drawn each, or all equal; default variable.", show_default=False),
    ] = None,
    subtype: Annotated[
        str | None, typer.Option(metavar="edge|between", help="Gaps also at both ends, or only between; default edge.", show_default=False)
    ] = None,
    transform: Annotated[
        bool | None, typer.Option("--transform/--no-transform", help="Change each digit a little.", show_default=False)
    ] = None,
    ground: Annotated[str, typer.Option(metavar="white|black", help="Black digits on white, or as MNIST has them.")] = "white",
    seed: Annotated[int | None, typer.Option(help="The same again gives the same; by default a new one.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="A .png or .jpg; with --count .npz or .h5.", show_default=False),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compose a set of so many, of random digits.", show_default=False)
    ] = None,
    length: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="Digits of each of a set.", show_default=False)] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON with image.transform, spacing.type, spacing.subtype, output_format.", show_default=False),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over the view sample: which digits.", show_default=False)] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the labels that are digits, where several are numbers from 0 to 9.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name, instead of numbering the new one.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=256, help="Processes of a set; by default one a core.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Compose an image of handwritten digits from the catalog's, of exactly the width asked for; or a set of many with --count."""
    import numpy as np

    from catalog.database import open_database
    from loaderd import digits as of_catalog
    from loaderd import sequence_files, sequences

    said = _config(config)
    chosen = {
        "spacing": _range("--spacing", spacing), "width": width, "type": kind or said.get("type", "variable"),
        "subtype": subtype or said.get("subtype", "edge"), "ground": ground,
        "transform": said.get("transform", False) if transform is None else transform,
    }  # fmt: skip
    if (digits is None) == (count is None):
        raise UsageError("give DIGITS for one image, or --count and --length for a set of random ones")
    numbers = [] if digits is None else sequences.numbers_of(digits)
    if count is None:
        if length is not None:
            raise UsageError("--length: is of a set (--count); one image is as long as its DIGITS")
        chosen["length"] = len(numbers)
        output = output or Path(f"seq_{digits}.{said.get('format', 'png')}")
        suffixes = sequence_files.PICTURES
    else:
        if length is None or output is None:
            raise UsageError("--count: a set needs --length, such as 3:8, and -o FILE")
        chosen["length"] = _range("--length", length)
        suffixes = sequence_files.SETS
    if output.suffix.lower() not in suffixes:
        raise UsageError(f"-o {output}: must end in {', '.join(suffixes)}")
    options = sequences.checked(chosen)
    seed = secrets.randbits(63) if seed is None else seed
    with open_database(database) as db:
        pool = of_catalog.load(db, where, labels=labels)
    if count is not None:
        with progress("composing sequences") as update:
            path = sequence_files.dataset(
                output, pool, options, count, seed,
                database=database, where=where, labels=labels, overwrite=overwrite, jobs=jobs, progress=update,
            )  # fmt: skip
        made = pool.sequencer(options)
        about: dict[str, Any] = {"path": str(path), "count": count, "height": made.height, "width": made.width, "seed": seed}
        text = f"{path}: {count} sequences of {made.height}×{made.width} px, {path.stat().st_size / 1e6:.1f} MB"
    else:
        one = pool.sequencer(options).compose(np.array([numbers]), sequences.generator(seed), dtype=np.uint8)
        image = one.images[0, :, : one.widths[0]]
        path = sequence_files.picture(output, image, overwrite=overwrite)
        about = {
            "path": str(path), "digits": "".join(map(str, numbers)), "height": image.shape[0], "width": image.shape[1],
            "boxes": one.boxes[0].tolist(), "members": one.members[0].tolist(), "seed": seed,
        }  # fmt: skip
        text = f"{path}: {image.shape[0]}×{image.shape[1]} px"
    if as_json:
        print_json({**about, "sequences": options})
    else:
        typer.echo(f"{text}, --seed {seed}")


def _range(name: str, text: str) -> tuple[int, int]:
    """Return two numbers written N or MIN:MAX."""
    ends = text.split(":")
    try:
        low, high = int(ends[0]), int(ends[-1])
    except ValueError:
        low, high = 0, -1
    if len(ends) > 2 or (len(ends) == 1 and high < 0):
        raise UsageError(f"{name} {text}: must be a whole number, or two such as 0:20")
    if low > high:
        raise UsageError(
            f"{name} {text}: {'is upside down; the smaller number comes first' if len(ends) == 2 else 'must be a whole number'}"
        )
    return low, high


def _config(path: Path | None) -> dict[str, Any]:
    """Return what a file in JSON says of transform, type, subtype and format; a key that means nothing is refused."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--config {path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--config {path}: must be an object with {', '.join(KEYS)}")
    if unknown := [key for key in found if key not in KEYS]:
        raise UsageError(f"--config {path}: {unknown[0]!r} is no key; there are {', '.join(KEYS)}")
    said: dict[str, Any] = {}
    for name, keys in CONFIG.items():
        part = found.get(name, {})
        if not isinstance(part, dict):
            raise UsageError(f"--config {path}: {name} must be an object with {', '.join(keys)}")
        if unknown := [key for key in part if key not in keys]:
            raise UsageError(f"--config {path}: {unknown[0]!r} is no key of {name}; there is {', '.join(keys)}")
        said |= {key: value.lower() if isinstance(value, str) else value for key, value in part.items()}
    if "output_format" in found:
        said["format"] = str(found["output_format"]).lower()
        if said["format"] not in FORMATS:
            raise UsageError(f"--config {path}: output_format is one of {', '.join(FORMATS)}")
    return said
