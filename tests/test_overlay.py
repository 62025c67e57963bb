"""Pictures of contours and masks: each thing at its place, to a fraction of an image pixel."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from catalog import contours, lettering, marks, overlay, show, viewing
from catalog.database import open_database
from catalog.marks import Mark
from catalog.overlay import Beside, Drawn, contact_sheet, panes

SQUARE = np.array([[40.0, 30.0], [60.0, 30.0], [60.0, 45.0], [40.0, 45.0]])


def drawn_square(structure="inner", *, convention="corner", shift=(0.0, 0.0), mask=False, points=SQUARE, shape=(96, 128)):
    raster = contours.rasterise([points], *shape, convention=convention, shift=shift) if mask else None
    return Drawn(structure, [points], convention, shift, raster, f"{structure}, v1")


def picture(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(png, pane):
    """How colourful each pixel of a pane is: images are grey, so only what was drawn counts."""
    part = picture(png)[pane.top : pane.top + pane.height, pane.left : pane.left + pane.width]
    return part.max(axis=2) - part.min(axis=2)


def centre_of_line(profile):
    """Where a line crosses a row of pixels, in pixels from its corner."""
    return float((profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum())


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5), (3.0, 1.5), (0.7, 1.0)])
@pytest.mark.parametrize(
    ("convention", "shift"), [("corner", (0, 0)), ("centre", (0, 0)), ("corner", (0.3, -1.2)), ("centre", (-0.5, 0.25))]
)
def test_a_contour_is_drawn_where_it_is(convention, shift, spacing):
    """A line runs where convention, shift and spacing put it, within a tenth of a pixel of the picture."""
    one = drawn_square(convention=convention, shift=shift)
    png = overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=spacing, caption=[])
    _, zoom = panes((96, 128), [one], spacing_mm=spacing)
    moved = SQUARE + shift + (0.5 if convention == "centre" else 0.0)
    (left, top), (right, bottom) = zoom.place(moved)[[0, 2]] - (zoom.left, zoom.top)
    cover = coloured(png, zoom).astype(float)
    cover[-60:] = np.where(cover[-60:] < 20, 0, cover[-60:])  # the scale bar
    middle_x, middle_y = int((left + right) / 2), int((top + bottom) / 2)
    assert centre_of_line(cover[middle_y, :middle_x]) == pytest.approx(left, abs=0.1)
    assert centre_of_line(cover[middle_y, middle_x:]) + middle_x == pytest.approx(right, abs=0.1)
    assert centre_of_line(cover[:middle_y, middle_x]) == pytest.approx(top, abs=0.1)
    assert centre_of_line(cover[middle_y:, middle_x]) + middle_y == pytest.approx(bottom, abs=0.1)


def test_an_image_pixel_and_its_mask_fill_the_same_square():
    """The image in the picture and the lines on it share one grid: a bright pixel lies within the outline of its mask."""
    image = np.zeros((96, 128))
    image[40, 50] = 1000.0
    mask = image > 0
    _, zoom = panes(image.shape, [Drawn("inner", [], "centre", (0, 0), mask, "")], spacing_mm=None)
    grey, _ = overlay.windowed(image)
    canvas = np.zeros((zoom.top + zoom.height, zoom.left + zoom.width, 3), np.float32)
    overlay.show(canvas, grey, zoom)
    bright = canvas[zoom.top :, zoom.left :, 0]
    ring = overlay.outline(mask, zoom)
    at = np.argwhere(ring)
    assert np.unravel_index(bright.argmax(), bright.shape) == pytest.approx(at.mean(axis=0), abs=1.0)
    (left, top), (right, bottom) = zoom.place(np.array([[50.0, 40.0], [51.0, 41.0]])) - (zoom.left, zoom.top)
    assert (at.min(axis=0) == (top - 1, left - 1)).all()
    assert (at.max(axis=0) == (bottom, right)).all()


def test_the_outline_encloses_the_masks_pixels():
    """Nothing of a mask is under its outline, and nobody leaves the mask in steps up, down or sideways without crossing it."""
    mask = np.random.default_rng(1).random((40, 40)) < 0.3
    one = Drawn("inner", [], "centre", (0.0, 0.0), mask, "")
    _, zoom = panes(mask.shape, [one], spacing_mm=(1.0, 1.3))
    ring = overlay.outline(mask, zoom)
    rows = ((np.arange(zoom.height) + 0.5) / zoom.scale[1] + zoom.y0).astype(int)
    columns = ((np.arange(zoom.width) + 0.5) / zoom.scale[0] + zoom.x0).astype(int)
    inside = mask[np.ix_(rows, columns)]
    ends = np.zeros_like(inside)  # only where the image ends the line is inside
    ends[[0, -1]] = ends[:, [0, -1]] = True
    assert not (ring & inside & ~ends).any()
    across = inside[:, :-1] != inside[:, 1:]
    assert (ring[:, :-1] | ring[:, 1:])[across].all()
    down = inside[:-1] != inside[1:]
    assert (ring[:-1] | ring[1:])[down].all()


def test_a_mask_of_the_whole_image_is_outlined_inside_it():
    """Where a mask reaches the image's end its outline is still to be seen."""
    mask = np.ones((20, 30), bool)
    pane = overlay.Pane(0, 0, 300, 200, 0, 0, 30, 20)
    assert overlay.outline(mask, pane).sum() == 2 * 300 + 2 * 200 - 4
    assert not overlay.outline(np.zeros((20, 30), bool), pane).any()


def test_a_small_mask_is_not_lost_in_a_small_picture():
    """One pixel of a large image is outlined though the picture is smaller than the image."""
    mask = np.zeros((1000, 1000), bool)
    mask[333, 777] = True
    assert overlay.outline(mask, overlay.Pane(0, 0, 256, 256, 0, 0, 1000, 1000)).any()


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0), (5.0, 1.0), (1.0, 1000.0), (1e-3, 2e-3)])
@pytest.mark.parametrize("shape", [(256, 256), (512, 200), (1, 1), (3, 2000), (2048, 2048)])
def test_what_was_drawn_is_in_the_zoomed_part(shape, spacing):
    """The part at the right holds all that was drawn, lies in the image, keeps pixels in proportion and the picture in bounds."""
    ring = np.array([[0.2, 0.6], [0.9, 0.6], [0.9, 0.8]]) * (shape[1], shape[0])
    one = Drawn("inner", [ring], "corner", (0.0, 0.0), None, "")
    whole, zoom = panes(shape, [one], spacing_mm=spacing)
    assert zoom.x0 <= ring[:, 0].min() and ring[:, 0].max() <= zoom.x0 + zoom.columns <= shape[1]
    assert zoom.y0 <= ring[:, 1].min() and ring[:, 1].max() <= zoom.y0 + zoom.rows <= shape[0]
    for pane, most in ((whole, overlay.WHOLE), (zoom, overlay.ZOOM)):
        assert 1 <= pane.width <= most and 1 <= pane.height <= most
        expected = 1.0 if spacing is None else spacing[0] / spacing[1]
        if min(pane.width, pane.height) > 50:
            assert pane.scale[1] / pane.scale[0] == pytest.approx(expected, rel=0.02)
    png = overlay.overlay(np.zeros(shape), [one], spacing_mm=spacing, caption=["x"])
    assert 400 < picture(png).shape[1] <= 1104


def test_a_pixel_of_the_zoomed_part_is_a_whole_number_of_pixels():
    """A ventricle in a 256 × 256 image is shown at least three times as large, on the grid of the picture."""
    _, zoom = panes((256, 256), [drawn_square(points=SQUARE * 2)], spacing_mm=(1.4, 1.4))
    assert zoom.scale[0] == zoom.scale[1] == int(zoom.scale[0]) >= 3


@pytest.mark.parametrize(
    ("spacing", "length"), [((1.0, 1.0), 10), ((1.36719, 1.36719), 10), ((1.5, 1.5), 10), ((0.5, 0.5), 5), ((0.8, 0.4), 5)]
)
def test_the_scale_bar_is_as_long_as_it_says(spacing, length):
    """The white bar in the zoomed part spans its length in mm, to a pixel of the picture; without spacing there is none."""
    one = drawn_square()
    _, zoom = panes((96, 128), [one], spacing_mm=spacing)
    row = zoom.top + zoom.height - 14
    for known in (spacing, None):
        if known is None:
            _, zoom = panes((96, 128), [one], spacing_mm=None)
            row = zoom.top + zoom.height - 14
        shown = picture(overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=known, caption=[]))
        white = (shown[row, zoom.left : zoom.left + zoom.width] == 255).all(axis=1).sum()
        if known is None:
            assert white == 0
        else:
            mm = white / zoom.scale[0] * spacing[1]
            assert mm in (
                pytest.approx(step * 10.0**power, abs=spacing[1] / zoom.scale[0]) for power in (-1, 0, 1, 2) for step in (1, 2, 5)
            )
            assert mm == pytest.approx(length, rel=0.02)


def test_inner_and_outer_differ_and_keep_their_colours():
    """A structure's colour does not hang on the others in the picture or on their order; two of one picture differ."""
    both = overlay.colours_of(["outer", "inner"])
    assert both == overlay.colours_of(["inner", "outer", "inner"])
    assert both == {"inner": (230, 159, 0), "outer": (86, 180, 233)}
    assert overlay.colours_of(["outer"])["outer"] == both["outer"]
    assert len(set(overlay.colours_of([f"organ {number}" for number in range(6)]).values())) == 6
    assert len(overlay.colours_of([f"organ {number}" for number in range(20)])) == 20
    readers = overlay.colours_for([drawn_square(), drawn_square(), drawn_square("outer")], both)
    assert len(set(readers)) == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int16, np.uint8, np.bool_])
def test_arrays_are_only_read(dtype):
    """Pictures of read-only arrays can be made, and leave them as they were."""
    image = (np.random.default_rng(0).random((96, 128)) * 100).astype(dtype)
    one = drawn_square(mask=True, points=SQUARE.copy())
    kept = image.copy(), one.rings[0].copy(), one.mask.copy()
    for array in (image, one.rings[0], one.mask):
        array.flags.writeable = False
    overlay.overlay(image, [one], spacing_mm=(1.0, 1.0), caption=["x"])
    contact_sheet(np.broadcast_to(image, (3, 96, 128)), np.broadcast_to(one.mask, (3, 1, 96, 128)), ["a", "b", "c"], ["inner"])
    for array, before in zip((image, one.rings[0], one.mask), kept, strict=True):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((8, 9), 7.0), "all values are 7"),
        (np.full((8, 9), np.nan), "no pixel is a number"),
        (np.where(np.eye(8) > 0, np.nan, np.arange(64.0).reshape(8, 8)), "8 px are no number and black"),
        (np.where(np.eye(8) > 0, np.inf, 3.0), "all values are 3, 8 px are no number"),
        (np.eye(300), "window 0 to 1 (least to largest value)"),
        (np.linspace(-1, 1, 64).reshape(8, 8) * 1.7e308, "window -1."),
        (np.full((8, 8), 5e-324) * np.eye(8), "window 0 to "),
    ],
)
def test_any_values_have_a_window(image, words):
    """Constant, missing and extreme values give grey values from 0 to 255, and words for what was done."""
    grey, said = overlay.windowed(image)
    assert words in said
    assert np.isfinite(grey).all() and grey.min() >= 0.0 and grey.max() <= 255.0
    assert (grey[~np.isfinite(image)] == 0.0).all()
    picture(overlay.overlay(image, [drawn_square(points=SQUARE / 10)], spacing_mm=None, caption=[]))
    picture(contact_sheet(image[np.newaxis], None, [""], []))


def test_one_hot_pixel_does_not_darken_the_image():
    """The window comes from percentiles: metal in one pixel leaves the rest as it was."""
    image = np.tile(np.arange(100.0), (100, 1))
    hot = image.copy()
    hot[50, 50] = 1e6
    assert np.abs(overlay.windowed(hot)[0] - overlay.windowed(image)[0])[:, :40].max() < 3.0


@pytest.mark.parametrize(
    "one",
    [
        Drawn("inner", [], "centre", (0.0, 0.0), None, "no rings"),
        Drawn("inner", [np.empty((0, 2))], "centre", (0.0, 0.0), np.zeros((96, 128), bool), "empty"),
        Drawn("inner", [np.array([[5.0, 5.0]])], "centre", (0.0, 0.0), None, "a point"),
        Drawn("inner", [np.array([[5.0, 5.0], [5.0, 5.0], [9.0, 9.0]])], "centre", (0.0, 0.0), None, "a line"),
        Drawn("", [SQUARE + 1e6, SQUARE - 1e6], "corner", (0.0, 0.0), None, ""),
        Drawn("inner", [SQUARE], "corner", (1e300, -1e300), None, "far outside"),
        Drawn(
            "inner",
            [np.array([[-500.0, -500], [900, -500], [900, 900], [-500, 900]])],
            "corner",
            (0, 0),
            np.ones((96, 128), bool),
            "around",
        ),
        drawn_square("\ud800 \n\t\0 心臓", mask=True),
    ],
)
def test_odd_annotations_make_a_picture(one):
    """No ring, no point, nothing inside the image, all of it, names that no font has: still a picture."""
    picture(overlay.overlay(np.zeros((96, 128)), [one, one], spacing_mm=(1.0, 1.0), caption=[one.label, "", "x" * 300]))


def test_what_lies_outside_is_said():
    """A contour that is partly or wholly off the image is not shown there; the legend counts its points."""
    half = drawn_square(shift=(-50.0, 0.0))
    rings = overlay.placed_rings(half)
    assert overlay._legend_text(half, rings, 96, 128) == "inner, v1, 2 of 4 points lie outside the image"
    empty = replace(half, shift=(500.0, 0.0), mask=np.zeros((96, 128), bool))
    assert "4 of 4 points" in overlay._legend_text(empty, overlay.placed_rings(empty), 96, 128)
    assert "its mask is empty" in overlay._legend_text(empty, overlay.placed_rings(empty), 96, 128)


def test_no_annotation_gives_the_image_alone():
    """Without anything drawn the picture is the whole image, grey."""
    shown = picture(overlay.overlay(np.random.default_rng(0).random((64, 64)), [], spacing_mm=(1.0, 1.0), caption=["sample 1"]))
    assert (shown.max(axis=2) == shown.min(axis=2)).all()
    assert panes((64, 64), [], spacing_mm=None)[1] is None


@pytest.mark.parametrize(
    ("image", "one", "spacing", "words"),
    [
        (np.zeros((4, 4, 3)), drawn_square(), None, "an image must be"),
        (np.zeros((0, 4)), drawn_square(), None, "an image must be"),
        (np.zeros((4, 4)), drawn_square(mask=True), None, r"is \(96, 128\), its image \(4, 4\)"),
        (np.zeros((4, 4)), drawn_square(points=np.zeros((4, 3))), None, "a ring must be"),
        (np.zeros((4, 4)), drawn_square(points=SQUARE * np.nan), None, "not finite"),
        (np.zeros((4, 4)), Drawn("inner", [SQUARE], "center", (0, 0), None, ""), None, "convention"),
        (np.zeros((4, 4)), drawn_square(), (0.0, 1.0), "spacing"),
        (np.zeros((4, 4)), drawn_square(), (1.0, np.nan), "spacing"),
    ],
)
def test_wrong_arguments_are_refused(image, one, spacing, words):
    """What does not fit the image is a ValueError, never a picture that looks right."""
    with pytest.raises(ValueError, match=words):
        overlay.overlay(image, [one], spacing_mm=spacing, caption=[])


def test_smoothing_of_the_picture_is_not_called_interpolation(monkeypatch):
    """`interpolated` is what labels are that nobody drew: the caption says of the picture that it is scaled."""
    written = []
    monkeypatch.setattr(overlay, "wrapped", lambda text, width: written.append(text) or [text])
    for spacing in ((1.0, 1.0), None):
        overlay.overlay(np.zeros((96, 128)), [drawn_square()], spacing_mm=spacing, caption=[])
    assert sum("; scaled smoothly" in text for text in written) == 2 and not any("interpolated" in text for text in written)


def test_lines_are_wrapped_and_cut_to_their_room():
    """No text runs out of the picture: long lines go on below, even without spaces, and nothing but the wrapping changes."""
    text = "SOP Instance UID " + "1.2.840." * 20 + " area 1798 mm²"
    lines = lettering.wrapped(text, 300)
    assert len(lines) > 3
    assert all(lettering.length(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lettering.length(lettering.cut(text, 100)) <= 100
    assert lettering.cut("short", 100) == "short"


def test_text_is_set_with_what_the_font_has():
    """Pillow's own font has no ², × or accents: they are raised, x and left out, instead of becoming boxes."""
    assert lettering.runs("12 mm² × Müller") == [("12 mm", lettering.TEXT), ("2", lettering.RAISED), (" x Muller", lettering.TEXT)]


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 64, 65])
def test_a_contact_sheet_shows_at_most_64(number, monkeypatch):
    """Four in a row; beyond 64 images the sheet grows no more, and says how many there are."""
    written = []
    write = overlay.write
    monkeypatch.setattr(overlay, "write", lambda draw, x, y, lines, colour: written.extend(lines) or write(draw, x, y, lines, colour))
    titles = [f"title {at}" for at in range(number)]
    shown = picture(contact_sheet(np.zeros((number, 8, 8), np.float16), np.ones((number, 2, 8, 8), bool), titles, ["inner", "outer"]))
    assert shown.shape[1] == (320 if number < 2 else overlay.MARGIN + min(number, 4) * (overlay.CELL + overlay.MARGIN))
    assert [line for line in written if line.startswith("title")] == titles[:64]
    assert ("… and 1 more" in written) == (number == 65)


def test_masks_of_a_contact_sheet_are_outlined_in_their_colours():
    """Each structure's mask is outlined on its own image only; one structure may come without its axis."""
    masks = np.zeros((2, 2, 64, 64), bool)
    masks[0, 0, 10:20, 10:20] = masks[1, 1, 30:50, 30:50] = True
    colours = overlay.colours_of(["inner", "outer"])
    shown = picture(contact_sheet(np.zeros((2, 64, 64)), masks, ["a", "b"], ["inner", "outer"]))
    cells = [shown[37 : 37 + 256, left : left + 256] for left in (16, 16 + 272)]
    for at, (own, other) in enumerate((("inner", "outer"), ("outer", "inner"))):
        assert (cells[at] == colours[own]).all(axis=2).sum() == 4 * (40, 80)[at] + 4
        assert not (cells[at] == colours[other]).all(axis=2).any()
    alone = picture(contact_sheet(np.zeros((2, 64, 64)), masks[:, 0], ["a", "b"], ["inner"]))
    assert (alone[37 : 37 + 256, 16 : 16 + 256] == colours["inner"]).all(axis=2).sum() == 164


@pytest.mark.parametrize(
    ("images", "masks", "titles", "structures", "words"),
    [
        (np.zeros((4, 4)), None, [], [], "images must be"),
        (np.zeros((2, 0, 4)), None, ["a", "b"], [], "images must be"),
        (np.zeros((2, 4, 4)), None, ["a"], [], "as many titles"),
        (np.zeros((2, 4, 4)), np.zeros((2, 1, 4, 5), bool), ["a", "b"], ["inner"], "masks of these images"),
        (np.zeros((2, 4, 4)), np.zeros((2, 1, 4, 4), bool), ["a", "b"], ["inner", "outer"], "masks of these images"),
    ],
)
def test_a_contact_sheet_refuses_what_does_not_fit(images, masks, titles, structures, words):
    """Numbers and shapes that contradict each other are a ValueError."""
    with pytest.raises(ValueError, match=words):
        contact_sheet(images, masks, titles, structures)


# ------------------------------------------------------------------------------------------ causes of flags


def with_mask(mask):
    return Drawn("inner", [], "centre", (0.0, 0.0), mask, "inner")


def test_a_crossing_is_marked_where_edges_cross():
    """A bow tie crosses itself once, in its middle, whatever its convention and shift."""
    bow = np.array([[10.0, 10.0], [30.0, 30.0], [30.0, 10.0], [10.0, 30.0]])
    for convention, shift, centre in (("corner", (0.0, 0.0), (20.0, 20.0)), ("centre", (1.0, -2.0), (21.5, 18.5))):
        found = marks.mark("CONTOUR-CROSSING", Drawn("a", [bow], convention, shift, None, ""), [], (64, 64))
        assert len(found.boxes) == 1
        left, top, right, bottom = found.boxes[0]
        assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(centre)
        assert right - left < 4
    assert len(marks.crossings([SQUARE])) == 0
    assert len(marks.crossings([SQUARE, SQUARE + 5.25])) == 2


def test_parts_and_holes_are_found():
    """The lesser parts are boxed and the largest is not; a hole is, and the background is none; corners join no parts."""
    mask = np.zeros((40, 50), bool)
    mask[5:20, 5:20] = True
    mask[20:22, 20:23] = True  # touches by a corner
    mask[30, 40] = True
    mask[10:12, 10:13] = False
    assert marks.parts(mask) == [(5, 5, 20, 20), (20, 20, 23, 22), (40, 30, 41, 31)]
    assert marks.parts(mask, diagonal=True) == [(5, 5, 23, 22), (40, 30, 41, 31)]
    assert marks.mark("MASK-PARTS", with_mask(mask), [], mask.shape).boxes == ((18.5, 18.5, 24.5, 23.5), (38.5, 28.5, 42.5, 32.5))
    assert marks.mark("MASK-HOLES", with_mask(mask), [], mask.shape).boxes == ((8.5, 8.5, 14.5, 13.5),)
    snake = np.zeros((9, 9), bool)
    snake[0::2] = True
    snake[1::4, 0] = snake[3::4, 8] = True
    assert marks.parts(snake) == [(0, 0, 9, 9)]


def test_the_border_and_what_sticks_out_are_marked():
    """Pixels on the image's edge, and those of the inner structure outside the outer one: these and no others."""
    inner, outer = np.zeros((2, 30, 40), bool)
    inner[10:20, 0:12] = True
    outer[8:22, 0:10] = True
    found = marks.mark("MASK-BORDER", with_mask(inner), [], inner.shape)
    assert found.boxes == ((0.0, 8.5, 2.5, 21.5),)
    assert found.pixels.sum() == 10 and found.pixels[10:20, 0].all()
    out = marks.mark("RELATION-OUTSIDE", with_mask(inner), [with_mask(outer)], inner.shape)
    np.testing.assert_array_equal(out.pixels, inner & ~outer)
    assert out.boxes == ((8.5, 8.5, 13.5, 21.5),)


def test_points_outside_and_gaps_are_marked():
    """Crosses where the image ends beside points beyond it; a line from a contour's last point to its first."""
    beyond = np.array([[5.0, 5.0], [-30.0, 12.0], [20.0, 900.0], [9.0, 9.0]])
    found = marks.mark("CONTOUR-OUTSIDE", Drawn("a", [beyond], "corner", (0, 0), None, ""), [], (40, 50))
    assert set(found.crosses) == {(0.5, 12.0), (20.0, 39.5)}
    gap = marks.mark("CONTOUR-OPEN", drawn_square(), [], (96, 128))
    assert gap.line == ((40.0, 45.0), (40.0, 30.0))


@pytest.mark.parametrize("rule", [*marks.CAUSES, "TEST-OWN"])
@pytest.mark.parametrize("one", [drawn_square(), drawn_square(mask=True), with_mask(np.zeros((96, 128), bool))])
def test_every_rule_marks_something_or_nothing(rule, one):
    """Where a cause is not found the structure is framed; a structure that is nowhere has no place."""
    found = marks.mark(rule, one, [], (96, 128))
    assert found.text == rule
    assert (found.place is None) == (one.mask is not None and not one.mask.any() and not one.rings)
    picture(overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=None, caption=[], marks=[found]))


def test_a_mark_is_drawn_at_its_place():
    """A box's sides are white lines where they are in the image, and without it nothing of the contour is white."""
    image = np.zeros((96, 128))
    image[32, 42] = 1000.0  # else all of it is grey
    one, mark = drawn_square(), Mark("A-RULE", boxes=((45.0, 33.0, 55.0, 41.0),))
    _, zoom = panes((96, 128), [one], spacing_mm=None)
    pictures = [picture(overlay.overlay(image, [one], spacing_mm=None, caption=[], marks=found)) for found in ([], [mark])]
    without, part = (shown[zoom.top : zoom.top + zoom.height, zoom.left : zoom.left + zoom.width].min(axis=2) for shown in pictures)
    added = (part - without).clip(0).astype(float)
    (left, top), (right, bottom) = zoom.place(np.array([[45.0, 33.0], [55.0, 41.0]])) - (zoom.left, zoom.top)
    row, column = int(top + bottom) // 2, int(left + right) // 2
    assert centre_of_line(added[row, :column]) == pytest.approx(left, abs=0.3)
    assert centre_of_line(added[row, column:]) + column == pytest.approx(right, abs=0.3)
    assert centre_of_line(added[row:, column]) + row == pytest.approx(bottom, abs=0.3)
    assert added.max() > 240


def test_findings_are_listed_and_neighbours_shown():
    """Each open flag adds lines; neighbours stand below with their own contours in the same colour."""
    one = drawn_square()
    plain = picture(overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=None, caption=["x"]))
    listed = picture(overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=None, caption=["x"], findings=[("error", "A"), ("info", "B")]))
    assert listed.shape[0] == plain.shape[0] + 2 * lettering.LINE_HEIGHT
    beside = [Beside("slice +10 mm", np.eye(96, 128), [one]), Beside("phase 3", np.eye(96, 128), [])]
    shown = picture(overlay.overlay(np.zeros((96, 128)), [one], spacing_mm=None, caption=["x"], beside=beside))
    strip = shown[plain.shape[0] - 40 :]
    colour = np.array(overlay.colours_of(["inner"])["inner"])
    found = (np.abs(strip - colour).max(axis=2) < 30).nonzero()[1]
    assert len(found) > 100 and found.max() < overlay.MARGIN + overlay.BESIDE


def test_colour_images_are_shown_in_colour():
    """RGB of 8 bits is drawn as it is; contours on it, too."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, :64] = (200, 10, 30)
    shown = picture(overlay.overlay(image, [drawn_square(mask=True)], spacing_mm=None, caption=[]))
    assert (shown[60, 60] == (200, 10, 30)).all()


def test_small_values_are_bright_in_an_inverted_image():
    """MONOCHROME1: what is least is white."""
    image = np.tile(np.arange(128.0), (96, 1))
    shown = picture(overlay.overlay(image, [], spacing_mm=None, caption=[], inverted=True))
    assert shown[300, 40, 0] > 200
    assert shown[300, 740, 0] < 60


# What eyes without one kind of cone see: Viénot, Brettel and Mollon (1999), in linear RGB.
SEEN = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


@pytest.mark.parametrize("kind", SEEN)
def test_inner_and_outer_differ_for_colour_blind_eyes(kind):
    """The two colours of nearly every picture are far apart for eyes without red or without green cones."""
    seen = []
    for colour in overlay.colours_of(["inner", "outer"]).values():
        linear = (np.array(colour) / 255) ** 2.2
        seen.append(255 * np.clip(np.array(SEEN[kind]) @ linear, 0, 1) ** (1 / 2.2))
    assert np.abs(seen[0] - seen[1]).max() > 100


def test_show_of_a_sample(ingested, conn, catalog, tmp_path):
    """The command draws flags and neighbours of a sample, and says neither patient nor UID unless it is asked to."""
    sample, pairing = conn.execute("SELECT image_id, id FROM pairing ORDER BY id LIMIT 1").fetchone()
    conn.execute("INSERT INTO flag (rule, severity, detail, pairing_id, raised_by) VALUES ('A-RULE', 'error', 'x', %s, 't')", [pairing])
    patient, uid = conn.execute("SELECT patient, sop_instance_uid FROM image_all WHERE sample_id = %s", [sample]).fetchone()
    with open_database(ingested) as db, db.connect() as own:
        (view,) = viewing.views(own, [sample])
        assert [flag.rule for flag in view.flags] == ["A-RULE"] and len(view.beside) >= 2
        assert [mark.text for mark in view.marks(view.drawn(), {})] == ["A-RULE"]
        said = " ".join(show.caption(view.image, identify=False))
        assert patient not in said and uid not in said
        said = " ".join(show.caption(view.image, identify=True))
        assert patient in said and uid in said
        assert show.picture(db, sample) == show.picture(db, sample)
    done = catalog("show", sample, "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert picture((tmp_path / "x.png").read_bytes()).shape[1] > 900
    for arguments, words in (
        ([sample, "-o", tmp_path / "x.jpg"], "ends in .png"),
        ([10**9, "-o", tmp_path / "y.png"], "not in the catalog"),
    ):
        done = catalog("show", *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
