"""A gallery as a page that a browser opens from the disk: one HTML file, its pictures in it or beside it, nothing from elsewhere.

Everything that comes from the catalog is escaped. Lines are SVG over the images, in mm: a contour is at its sub-pixel place, as thin on
a large view as on a small one, and keys hide it, which is how one sees what lies below.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from catalog import viewing
from catalog.canvas import Colour, round_length
from catalog.errors import UsageError
from catalog.gallery import Card, Layer, Made, Region, made, palette
from catalog.lettering import one_line
from catalog.marks import Mark
from catalog.overlay import colours_for
from catalog.processes import Progress
from catalog.viewing import View

TEMPLATE = Path(__file__).with_name("gallery.html")
PICTURES = "pictures"  # the folder beside the page
_GENERATOR = '<meta name="generator" content="scanfeed gallery">'
_UNFINISHED = f"<!doctype html>{_GENERATOR}<p>This gallery was not finished.</p>"
KEYS = (
    "<span class=dim><kbd>&rarr;</kbd> <kbd>j</kbd> next, <kbd>&larr;</kbd> <kbd>k</kbd> previous, <kbd>Home</kbd> <kbd>End</kbd>, "
    "<kbd>Enter</kbd> large, <kbd>c</kbd> contours, <kbd>m</kbd> masks, <kbd>f</kbd> flags' places</span>"
)


def page(
    cards: Sequence[Card],
    images: Mapping[int, Made],
    inside: Mapping[str, set[str]],
    *,
    title: str,
    embed: bool,
) -> str:
    """Return the page as text. With `embed` it holds the pictures, else it takes them from the folder `PICTURES` beside it.

    `images` may have been stripped of their PNGs where they lie beside it: only how many there are, and of what part, is looked at.
    """
    colours = palette(cards)
    legend = "".join(f"<span {_colour(colour)}><i></i>{_plain(name)}</span>" for name, colour in sorted(colours.items()))
    legend += "<span style='--k:#aaa' class=dim><i></i>contour, as drawn</span>" if colours else ""
    legend += "<span style='--k:#aaa' class=dim><i class=dashed></i>edge of the mask's pixels</span>" if colours else ""
    paths = []
    for one in images.values():
        for pairing, (contour, edge) in one.paths.items():
            paths.append(f'<path id="c{pairing}" d="{contour}"/><path id="e{pairing}" d="{edge}"/>')
    pictures = ""
    if embed:
        encoded = {
            f"{number}-{at}": "data:image/png;base64," + base64.b64encode(layer.png).decode()
            for number, one in images.items()
            for at, layer in enumerate(one.layers)
        }
        pictures = json.dumps(encoded)[1:-1]
    parts = {
        "<!--HEAD-->": f"<div><strong>{_plain(title)}</strong></div><div>{legend}</div><div>{KEYS}</div>",
        "<!--PATHS-->": "".join(paths),
        "<!--CARDS-->": "\n".join(_card(card, images, inside, colours, embed) for card in cards) or "<p>no samples</p>",
        "/*PICTURES*/": pictures,
    }
    text = TEMPLATE.read_text()
    out: list[str] = []
    for marker, part in parts.items():  # in the template's order; what was put in is not looked at again
        before, text = text.split(marker, 1)
        out += [before, part]
    whole = "".join([*out, text])
    # No other script runs, and nothing is loaded from elsewhere, whatever a name in the catalog holds.
    script = whole.rpartition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return whole.replace("SCRIPT-SHA256", allowed, 1)


def file_names(one: Made) -> list[str]:
    """Return what the pictures of an image are called in the folder beside the page."""
    return [f"{one.sample_id}-{at}.png" for at in range(len(one.layers))]


def _card(card: Card, images: Mapping[int, Made], inside: Mapping[str, set[str]], colours: Mapping[str, Colour], embed: bool) -> str:
    view, image = card.view, card.view.image
    row_mm, column_mm = view.spacing or (1.0, 1.0)
    whole = Region(0, 0, image["columns"], image["rows"])
    marks = _marks(view.marks(card.drawn, inside), card.region, (row_mm, column_mm))
    main = _view(view, images, card.region, colours, embed, more=marks + _bar(card.region, view.spacing))
    crop = card.region
    frame = f'<path class="crop" d="M{crop.x0} {crop.y0}h{crop.columns}v{crop.rows}h{-crop.columns}z"/>' if crop != whole else ""
    strip = [f"<figure>{_view(view, images, whole, colours, embed, inner=frame, lines=False)}<figcaption>whole image</figcaption></figure>"]
    for title, other in view.beside:
        strip.append(f"<figure>{_view(other, images, card.region, colours, embed)}<figcaption>{_plain(title)}</figcaption></figure>")
    flags = "".join(
        f'<li class="{severity}">{severity}: {_plain(text)}</li>' for severity, text in view.findings(card.drawn)
    )  # fmt: skip
    notes = [one.label for one in card.drawn.values()] + view.labels()
    window = images[image["sample_id"]].window if image["sample_id"] in images else ""
    notes += [f"{image['rows']} × {image['columns']} px{'' if view.spacing else ', pixel spacing unknown'}" + f", {window}" * bool(window)]
    listed = "".join(f"<li class=dim>{_plain(note)}</li>" for note in notes)
    where = " · ".join(viewing.where(image))
    return (
        f'<article id="s{image["sample_id"]}" tabindex="-1"><h2>sample {image["sample_id"]} <small>{_plain(where)}</small></h2>'
        f'{main}<div class="strip">{"".join(strip)}</div><ul>{flags or "<li class=info>no open flags</li>"}{listed}</ul></article>'
    )


def _view(
    view: View,
    images: Mapping[int, Made],
    region: Region,
    colours: Mapping[str, Colour],
    embed: bool,
    *,
    more: str = "",
    inner: str = "",
    lines: bool = True,
) -> str:
    """A part of an image with its lines. `inner` is SVG in px of the image, `more` in mm from the part's corner."""
    row_mm, column_mm = view.spacing or (1.0, 1.0)
    width, height = region.columns * column_mm, region.rows * row_mm
    ratio = f"--ratio:{width / height:.6g}"
    one = images.get(view.image["sample_id"])
    if one is None or one.problem or not one.layers:
        why = one.problem if one is not None and one.problem else "no picture"
        return f'<div class="view" style="{ratio}"><p>cannot be shown: {_plain(why)}</p></div>'
    pictures = "".join(_picture(one, at, layer, region, embed) for at, layer in enumerate(one.layers))
    shapes = ""
    if lines:
        drawn = view.drawn()
        for (pairing, shape), colour in zip(drawn.items(), colours_for(list(drawn.values()), colours), strict=True):
            if pairing in one.paths:
                under = " under" if shape.rings else ""
                shapes += f'<g {_colour(colour)}><use href="#e{pairing}" class="edge{under}"/><use href="#c{pairing}" class="contour"/></g>'
    scale = f"scale({column_mm:.9g} {row_mm:.9g}) translate({-region.x0} {-region.y0})"
    return (
        f'<div class="view" style="{ratio}">{pictures}<svg viewBox="0 0 {width:.9g} {height:.9g}">'
        f'<g transform="{scale}">{shapes}{inner}</g>{more}</svg></div>'
    )


def _picture(one: Made, at: int, layer: Layer, region: Region, embed: bool) -> str:
    part = layer.region
    place = (
        f"left:{(part.x0 - region.x0) / region.columns:.6%};top:{(part.y0 - region.y0) / region.rows:.6%};"
        f"width:{part.columns / region.columns:.6%};height:{part.rows / region.rows:.6%}"
    )
    name = f"{one.sample_id}-{at}"
    source = f'data-p="{name}"' if embed else f'src="{PICTURES}/{name}.png" loading="lazy"'
    return f'<img alt="" {source} style="{place}">'


def _marks(marks: Sequence[Mark], region: Region, spacing: tuple[float, float]) -> str:
    """Where causes of flags are, white on black, and the rules' codes beside them, one below the other where they would meet."""
    row_mm, column_mm = spacing
    size = 0.03 * min(region.columns * column_mm, region.rows * row_mm)  # mm: of letters, and of a cross's arms
    arm_x, arm_y = size / 2 / column_mm, size / 2 / row_mm
    shapes, texts = "", ""
    taken: list[tuple[float, float]] = []
    for mark in marks:
        path = "".join(f"M{a:.2f} {b:.2f}H{c:.2f}V{d:.2f}H{a:.2f}Z" for a, b, c, d in mark.boxes)
        for x, y in mark.crosses:
            left, right, top, bottom = x - arm_x, x + arm_x, y - arm_y, y + arm_y
            path += f"M{left:.2f} {top:.2f}L{right:.2f} {bottom:.2f}M{left:.2f} {bottom:.2f}L{right:.2f} {top:.2f}"
        shapes += f'<path class="halo" d="{path}"/><path d="{path}"/>' if path else ""
        if len(mark.line) == 2:
            (x, y), (to_x, to_y) = mark.line
            shapes += f'<path class="dots" d="M{x:.2f} {y:.2f}L{to_x:.2f} {to_y:.2f}"/>'
        if mark.pixels is not None:
            shapes += f'<path class="pixels" d="{_pixel_path(mark)}"/>'
        if mark.place is not None:
            at_x = max((mark.place[0] - region.x0) * column_mm, size / 2)
            at_y = max((mark.place[1] - region.y0) * row_mm - size / 2, 1.2 * size)
            while any(abs(at_x - x) < 0.6 * size * len(mark.text) and abs(at_y - y) < 1.1 * size for x, y in taken):
                at_y += 1.2 * size
            taken.append((at_x, at_y))
            texts += f'<text x="{at_x:.4g}" y="{at_y:.4g}" font-size="{size:.4g}" stroke-width="{size / 5:.4g}">{_plain(mark.text)}</text>'
    scale = f"scale({column_mm:.9g} {row_mm:.9g}) translate({-region.x0} {-region.y0})"
    return f'<g class="mark"><g transform="{scale}">{shapes}</g>{texts}</g>' if shapes else ""


def _pixel_path(mark: Mark) -> str:
    assert mark.pixels is not None
    return "".join(f"M{column} {row}h1v1h-1z" for row, column in np.argwhere(mark.pixels).tolist())


def _bar(region: Region, spacing: tuple[float, float] | None) -> str:
    """A scale bar of 1, 2 or 5 × 10ⁿ mm, at most a third of the view."""
    if spacing is None:
        return ""
    width, height = region.columns * spacing[1], region.rows * spacing[0]
    size = 0.035 * min(width, height)
    mm = round_length(width / 3)
    x, y = size, height - size
    return (
        f'<path class="bar" d="M{x:.6g} {y:.6g}h{mm:.6g}"/><text x="{x:.6g}" y="{y - size / 2:.6g}" font-size="{size:.4g}" '
        f'stroke-width="{size / 5:.4g}">{mm:g} mm</text>'
    )


def _colour(colour: Iterable[int]) -> str:
    return 'style="--k:#{:02x}{:02x}{:02x}"'.format(*colour)


def _plain(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def write_folder(
    folder: Path, cards: Sequence[Card], inside: Mapping[str, set[str]], *, title: str, processes: int | None, progress: Progress
) -> list[str]:
    """Write a page and its pictures into a folder; what an earlier gallery left there is taken away. Returns what could not be shown.

    Raises:
        UsageError: If the folder holds anything but a gallery.
    """
    index, pictures = folder / "index.html", folder / PICTURES
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is no folder; -o takes a folder, or a file that ends in .png or .html")
    if folder.is_dir() and any(folder.iterdir()) and not _is_gallery(index):
        raise UsageError(f"{folder}: holds other things than a gallery, which nothing is written over; give a new folder")
    pictures.mkdir(parents=True, exist_ok=True)
    index.write_text(_UNFINISHED)
    stale = {path.name for path in pictures.glob("*.png")}
    images: dict[int, Made] = {}

    def take(one: Made) -> None:
        for name, layer in zip(file_names(one), one.layers, strict=True):
            (pictures / name).write_bytes(layer.png)
            stale.discard(name)
        images[one.sample_id] = replace(one, layers=[Layer(b"", layer.region) for layer in one.layers])

    made(cards, take, processes=processes, progress=progress)
    for name in stale:
        (pictures / name).unlink()
    index.write_text(page(cards, images, inside, title=title, embed=False))
    return _problems(cards, images)


def write_file(
    path: Path, cards: Sequence[Card], inside: Mapping[str, set[str]], *, title: str, processes: int | None, progress: Progress
) -> list[str]:
    """Write a page that holds its pictures itself. Returns what could not be shown."""
    images: dict[int, Made] = {}
    made(cards, lambda one: images.update({one.sample_id: one}), processes=processes, progress=progress)
    path.write_text(page(cards, images, inside, title=title, embed=True))
    return _problems(cards, images)


def _is_gallery(index: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError), index.open() as file:
        return _GENERATOR in file.read(1_000)
    return False


def _problems(cards: Sequence[Card], images: Mapping[int, Made]) -> list[str]:
    numbers = [card.view.image["sample_id"] for card in cards]
    return [f"sample {number}: {images[number].problem}" for number in numbers if images[number].problem]
