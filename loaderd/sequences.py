"""Sequences of handwritten digits as images: which digits, which images of them, how far apart, and their pixels.

Everything that is random about a sequence comes from its own words of a counter-based generator (`numpy.random.Philox`), so a sequence is
the same whatever it is composed together with. Of a digit each of its images is as likely as any other; a digit that is not to be shown
any more (`alive`) is drawn anew from its own word, so no other sequence changes.

The images are white on black, as MNIST's are. What is composed is black on white by default, and its values are whole 255ths.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catalog.errors import CatalogError, UsageError
from loaderd import distortion
from loaderd.gaps import SUBTYPES, TYPES, Spacing, Words, below

if TYPE_CHECKING:
    from loaderd.digits import Digits

GROUNDS = ("white", "black")
MOST_DIGITS = 100
WIDEST = 16_384  # px
DEFAULTS: dict[str, Any] = {
    "spacing": [0, 20], "width": None, "type": "variable", "subtype": "edge", "ground": "white", "transform": False,
}  # fmt: skip
AT_ONCE = 32  # sequences: their bytes stay in the processor's cache until they are converted
DRAWS = 64  # of an image that may be shown
OF_ONE = 1 << 32  # second word of Philox's counter: a sequence by its key; above all transforms of a stream, which count from 0
OF_MANY = (1 << 32) + 1  # a part of a set by its number


@dataclass(frozen=True, slots=True)
class Composed:
    """Composed sequences; L is the length of the longest that there can be.

    Attributes:
        images: (B, rows, columns), float32 from 0 to 1 or uint8.
        digits: int64 (B, L), -1 beyond the sequence.
        boxes: int64 (B, L, 4): top, left, height, width of each digit in px, -1 beyond.
        members: int64 (B, L): the sample_ids of the digits' images, -1 beyond.
        widths: int64 (B,): columns of each sequence with its gaps, px; what follows is ground.
    """

    images: NDArray[Any]
    digits: NDArray[np.int64]
    boxes: NDArray[np.int64]
    members: NDArray[np.int64]
    widths: NDArray[np.int64]


def checked(given: object) -> dict[str, Any]:
    """Return the options of sequences in their one form: `length`, and of the others what differs from its default.

    Args:
        given: A mapping. ``length``: digits, n or (fewest, most). ``spacing``: the narrowest and the widest gap in px, default (0, 20).
            ``width``: of the images in px; by default what the widest sequence needs, and ground follows the others. ``type``:
            ``"variable"`` or ``"fixed"``. ``subtype``: ``"edge"`` or ``"between"``. ``ground``: ``"white"`` or ``"black"``. ``transform``:
            change each digit a little.

    Raises:
        UsageError: Saying which option, and what it must be. Whether digits fit a width is for `Sequencer` to say: it knows their size.
    """
    known = ", ".join(["length", *DEFAULTS])
    if not isinstance(given, Mapping):
        raise UsageError(f"sequences={_short(given)}: must be options of these: {known}")
    if unknown := [name for name in given if name != "length" and name not in DEFAULTS]:
        raise UsageError(f"sequences: {_short(unknown[0])} is no option; there are {known}")
    found = {**DEFAULTS, **given}
    if "length" not in found:
        raise UsageError("sequences: length is missing: how many digits, such as 5 or (3, 8)")
    length = found["length"]
    low, high = _pair("length", [length, length] if _whole(length) is not None else length, 1, MOST_DIGITS, "a number of digits or two")
    spacing = _pair("spacing", found["spacing"], 0, WIDEST, "the narrowest and the widest gap in px, two whole numbers")
    width = found["width"]
    if width is not None and (_whole(width) is None or not 1 <= width <= WIDEST):
        raise UsageError(f"width={_short(width)}: must be a whole number of px from 1 to {WIDEST}")
    for name, allowed in (("type", TYPES), ("subtype", SUBTYPES), ("ground", GROUNDS)):
        if found[name] not in allowed:
            raise UsageError(f"{name}={_short(found[name])}: must be {' or '.join(map(repr, allowed))}")
    if type(found["transform"]) is not bool:
        raise UsageError(f"transform={_short(found['transform'])}: must be true or false")
    plain = {**found, "length": [low, high], "spacing": list(spacing), "width": None if width is None else int(width)}
    return {name: value for name, value in plain.items() if name == "length" or value != DEFAULTS[name]}


class Sequencer:
    """Composes sequences of digits from a pool of images. Not for several threads at a time: it has scratch memory.

    Args:
        options: As of `checked`.
        images: uint8 (N, rows, columns), ink bright on 0; all of one size. Kept, not copied.
        labels: (N,) whole numbers from 0 to 9.
        sample_ids: int64 (N,).
        alive: bool (N,): which images may be shown; looked at each time, so that the owner may set some to False at any time.

    Attributes:
        height, width: Of the composed images, in px.
        max_length: Of the longest sequence, in digits.

    Raises:
        UsageError: For options that cannot be, with the widths that can.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        sample_ids: NDArray[np.int64],
        alive: NDArray[np.bool_] | None = None,
    ) -> None:
        self.options = checked(options)
        chosen = {**DEFAULTS, **self.options}
        self.min_length, self.max_length = chosen["length"]
        self.height, self._side = images.shape[1:]
        low, high = chosen["spacing"]
        self._spacing = Spacing(chosen["type"], chosen["subtype"], low, high, chosen["width"], self._side)
        self._spacing.check(range(self.min_length, self.max_length + 1))
        self.width: int = chosen["width"] or self._spacing.widths(self.max_length)[-1]
        if self.width > WIDEST:
            raise UsageError(
                f"up to {self.max_length} digits with gaps of up to {high} px are {self.width} px wide; at most {WIDEST} are possible"
            )
        self._white, self._transform = chosen["ground"] == "white", chosen["transform"]
        if self._transform:
            distortion.needed()
        self._images, self._labels, self._sample_ids = images, np.asarray(labels, np.int64), sample_ids
        self._alive = np.ones(len(images), np.bool_) if alive is None else alive
        # All images of a 0 by their place in the pool, then those of a 1, …
        self._order = np.argsort(self._labels, kind="stable")
        self._first = np.searchsorted(self._labels[self._order], np.arange(11))
        self._starts: list[int] = self._first.tolist()
        self._counts: list[int] = np.diff(self._first).tolist()
        self._drawn = np.flatnonzero(np.diff(self._first))  # digits that there are
        longest = self.max_length
        self._gap_words = max(self._spacing.words(one) for one in range(self.min_length, longest + 1))
        self._words = 2 + 2 * longest + self._gap_words + (distortion.WORDS * longest if self._transform else 0)
        self._philox = np.random.Philox(key=[0, 0])
        self._state: Any = self._philox.state  # before anything was drawn: its buffer is empty
        self._canvas = np.empty((AT_ONCE, self.height, self.width), np.uint8)
        # [sequence, left] is where a digit goes to.
        row, byte = self._canvas.strides[1:]
        self._places = np.lib.stride_tricks.as_strided(
            self._canvas, (AT_ONCE, self.width - self._side + 1, self.height, self._side), (self._canvas.strides[0], byte, row, byte)
        )
        self._crops = np.empty((AT_ONCE * longest, self.height, self._side), np.uint8)

    def fill(
        self,
        key: bytes,
        epoch: int,
        seed: int,
        anchor: int,
        out_image: NDArray[Any],
        out_digits: NDArray[np.int64],
        out_boxes: NDArray[Any],
        out_members: NDArray[np.int64],
    ) -> None:
        """Compose the sequence of one position of a stream: `fill_batch` of one."""
        self.fill_batch([key], epoch, seed, np.array([anchor]), out_image[None], out_digits[None], out_boxes[None], out_members[None])

    def fill_batch(
        self,
        keys: Sequence[bytes],
        epoch: int,
        seed: int,
        anchors: NDArray[np.int64],
        out_images: NDArray[Any],
        out_digits: NDArray[np.int64],
        out_boxes: NDArray[Any],
        out_members: NDArray[np.int64],
    ) -> None:
        """Compose sequences, each with a certain image as one of its digits, straight into arrays.

        Where that image stands, how long the sequence is and what the others are is drawn from Philox(seed, epoch, key): the other digits
        uniformly from 0 to 9 (of those that the pool has), then uniformly among that digit's images.

        Args:
            keys: 16 bytes each, the sample_keys of the anchors.
            anchors: (B,): their places in the pool.
            out_images: (B, height, width) of any float dtype, or uint8; may be a view with strides.
            out_digits, out_boxes, out_members: (B, L), (B, L, 4), (B, L) of integers; as of `Composed`.

        Raises:
            CatalogError: If no image of a digit is left that may be shown.
        """
        words = np.empty((len(keys), self._words), np.uint64)
        state = self._state["state"]
        state["key"][:] = np.uint64(seed % 2**64), np.uint64(epoch)
        for number, key in enumerate(keys):
            state["counter"][:] = 0, OF_ONE, int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
            self._philox.state = self._state
            words[number] = self._philox.random_raw(self._words)
        self._compose(words, None, anchors, out_images, out_digits, out_boxes, out_members)

    def part(self, seed: int, number: int, count: int, *, dtype: Any = np.float32) -> Composed:
        """Return `count` sequences of random digits: the part with this number of a set, the same whoever composes it.

        Args:
            dtype: Of the images: a float dtype, or uint8 for 255ths.

        Raises:
            CatalogError: If no image of a digit is left that may be shown.
        """
        philox = np.random.Philox(key=[seed % 2**64, 0], counter=[0, OF_MANY, 0, number])
        return self._new(philox.random_raw(count * self._words).reshape(count, self._words), None, dtype)

    def compose(self, digits: NDArray[np.int64], generator: np.random.Generator, *, dtype: Any = np.float32) -> Composed:
        """Return a sequence for each row of digits: (B, L), -1 beyond the sequence, which is as long as `length` allows.

        Raises:
            UsageError: If there is no image of a digit.
        """
        words = generator.integers(0, 2**64, (len(digits), self._words), np.uint64)
        return self._new(words, digits, dtype)

    def image(self, digits: Sequence[int], generator: np.random.Generator) -> NDArray[np.float32]:
        """Return the image alone of one sequence, as wide as it is: that of `compose`, by few calls of numpy: a fifth of the time.

        Raises:
            UsageError: If there is no image of a digit.
        """
        words = _words(generator, self._words)
        length, starts, counts = len(digits), self._starts, self._counts
        drawn: list[int] = words[2 + self.max_length :].tolist()
        there = 0 not in [counts[digit] for digit in digits]
        of_pool = [starts[digit] + (word * counts[digit] >> 64) for digit, word in zip(digits, drawn, strict=False)]
        indices = self._order.take(of_pool, mode="clip")
        if not (there and all(self._alive.take(indices).tolist())):
            made = self._new(words[None], np.array([digits]), np.float32)
            return made.images[0, :, : made.widths[0]]
        crops = self._images.take(indices, axis=0)
        if self._transform:
            changes = words[-distortion.WORDS * self.max_length :].reshape(-1, distortion.WORDS)
            distortion.distort(crops, changes[:length], dropped_to=255 if self._white else 0)
        gaps = self._spacing.draw_one(drawn[self.max_length :], length)
        lefts = [total + place * self._side for place, total in enumerate(accumulate(gaps))]  # the last one is the width
        width = lefts.pop()
        canvas = np.zeros((self.height, width), np.uint8)
        # [left] is where a digit goes to; as in the scratch canvas, which is not used as `compose` may be called by several threads.
        np.ndarray((width - self._side + 1, self.height, self._side), np.uint8, canvas, strides=(1, width, 1))[lefts] = crops
        if self._white:
            np.invert(canvas, out=canvas)  # 255 - value
        return np.divide(canvas, np.float32(255), dtype=np.float32)

    def _new(self, words: Words, digits: NDArray[np.int64] | None, dtype: Any) -> Composed:
        count, longest = len(words), self.max_length
        images = np.empty((count, self.height, self.width), dtype)
        drawn, members = np.empty((2, count, longest), np.int64)
        boxes = np.empty((count, longest, 4), np.int64)
        widths = self._compose(words, digits, None, images, drawn, boxes, members)
        return Composed(images, drawn, boxes, members, widths)

    # -------------------------------------------------------------------------------------- what is drawn

    def _compose(
        self,
        words: Words,
        digits: NDArray[np.int64] | None,
        anchors: NDArray[np.int64] | None,
        out_images: NDArray[Any],
        out_digits: NDArray[np.int64],
        out_boxes: NDArray[Any],
        out_members: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Compose, and return how wide each sequence is with its gaps."""
        longest = self.max_length
        of_digits, of_images, rest = words[:, 2 : 2 + longest], words[:, 2 + longest : 2 + 2 * longest], words[:, 2 + 2 * longest :]
        of_gaps, of_changes = rest[:, : self._gap_words], rest[:, self._gap_words :]
        if digits is None:
            lengths = self.min_length + below(words[:, 0], longest - self.min_length + 1)
            digits = self._drawn[below(of_digits, len(self._drawn))]
        else:
            lengths = np.count_nonzero(digits >= 0, axis=1)
        inside = np.arange(longest) < lengths[:, None]
        rows = np.arange(len(words))
        if anchors is not None:
            places = below(words[:, 1], lengths)
            digits[rows, places] = self._labels[anchors]
        digits = np.where(inside, digits, 0)
        indices = self._drawn_images(digits, of_images, inside)
        if anchors is not None:
            indices[rows, places] = anchors
        left, widths = self._left(lengths, of_gaps)
        out_digits[...] = np.where(inside, digits, -1)
        out_members[...] = np.where(inside, self._sample_ids[indices], -1)
        for side, value in enumerate((0, left, self.height, self._side)):
            out_boxes[..., side] = np.where(inside, value, -1)
        self._draw(indices, left, inside, of_changes, out_images)
        return widths

    def _drawn_images(self, digits: NDArray[np.int64], words: Words, inside: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return places in the pool of an image of each digit."""
        first = self._first[digits]
        counts = self._first[digits + 1] - first
        if not counts[inside].all():
            missing = digits[inside & (counts == 0)][0]
            raise UsageError(f"digits: there is no image of a {missing} in the catalog that may be shown")
        # Beyond the sequence: any image.
        indices: NDArray[np.int64] = self._order[np.minimum(first + below(words, counts), len(self._order) - 1)]
        for _ in range(DRAWS):
            dead = inside & ~self._alive[indices]
            if not dead.any():
                return indices
            words = distortion.mixed(words + distortion.GOLDEN)
            indices[dead] = self._order[first[dead] + below(words[dead], counts[dead])]
        # Nearly all of a digit's images are gone: choose among the rest.
        for row, place in np.argwhere(inside & ~self._alive[indices]):
            digit = digits[row, place]
            those = self._order[self._first[digit] : self._first[digit + 1]]
            those = those[self._alive[those]]
            if not len(those):
                raise CatalogError(f"no image of a {digit} is left that may be shown: all of them were revoked")
            indices[row, place] = those[below(words[row : row + 1, place], len(those))[0]]
        return indices

    def _left(self, lengths: NDArray[np.int64], words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first columns of the digits, (B, L), anything beyond the sequences; and the sequences' widths, (B,)."""
        left = np.zeros((len(lengths), self.max_length), np.int64)
        widths = np.empty(len(lengths), np.int64)
        for length in sorted(set(lengths.tolist())):
            some = np.flatnonzero(lengths == length)
            gaps = self._spacing.draw(words[some], length)
            left[some, :length] = np.cumsum(gaps[:, :-1], axis=1) + np.arange(length) * self._side
            widths[some] = gaps.sum(axis=1) + length * self._side
        return left, widths

    # -------------------------------------------------------------------------------------- what is seen

    def _draw(
        self, indices: NDArray[np.int64], left: NDArray[np.int64], inside: NDArray[np.bool_], words: Words, out: NDArray[Any]
    ) -> None:
        ground = 255 if self._white else 0
        whole = np.dtype(out.dtype).type(255)
        for start in range(0, len(indices), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            shown = inside[some]
            number = len(shown)
            sequence, place = np.nonzero(shown)
            crops = self._crops[: len(sequence)]
            np.take(self._images, indices[some][shown], axis=0, out=crops, mode="clip")
            if self._transform:
                changes = words[some].reshape(number, -1, distortion.WORDS)[sequence, place]
                # Dropped pixels are black, as in the seed: ink on white, and ground on black.
                distortion.distort(crops, changes, dropped_to=255 if self._white else 0)
            if self._white:
                np.invert(crops, out=crops)  # 255 - value
            canvas = self._canvas[:number]
            canvas.fill(ground)
            self._places[sequence, left[some][shown]] = crops
            if out.dtype == np.uint8:
                out[some] = canvas
            else:
                np.copyto(out[some], canvas)  # 3.4 µs an image with what follows; 5.0 as one division of two dtypes
                np.divide(out[some], whole, out=out[some])


# ------------------------------------------------------------------------------------------ one image


def compose(
    digits: str | Iterable[int],
    spacing_range: tuple[int, int] = (0, 20),
    image_width: int | None = 390,
    *,
    type: str = "variable",
    subtype: str = "edge",
    ground: str = "white",
    transform: bool = False,
    seed: int | np.random.Generator | None = None,
    pool: Digits | None = None,
    labels: str | None = None,
    database: str | None = None,
) -> NDArray[np.float32]:
    """Return an image of these digits side by side: float32 (28, image_width), 0 black to 1 white.

    Args:
        digits: Such as ``"0123"`` or ``[0, 1, 2, 3]``.
        spacing_range: The narrowest and the widest gap in px, both inclusive.
        image_width: In px, exact; 390 by default, which suits ten digits. None: what the gaps give.
        type: ``"variable"``: gaps drawn uniformly among all tuples that give the width; ``"fixed"``: all gaps equal.
        subtype: ``"edge"``: also before the first and behind the last digit; ``"between"``: only between digits.
        ground: ``"white"`` under black digits, or ``"black"`` under white ones, as MNIST's are.
        transform: Change each digit a little: see `loaderd.distortion`.
        seed: The same seed and catalog give the same image. A generator goes on, so that the next image differs. None: from the system.
        pool: The images; by default those of the catalog, read once a process (`loaderd.digits.load`).
        labels: For that, the name of the labels that are digits: needed where labels of several names are numbers from 0 to 9.
        database: A PostgreSQL URL for that; by default ``CATALOG_DATABASE_URL``, else the embedded database.

    Raises:
        UsageError: If no gaps within the range give the width, with the widths that are possible, and for all that is no digit or range.
        CatalogError: If the catalog has no digits, or is out of reach.
    """
    numbers = numbers_of(digits)
    options = {
        "length": len(numbers), "spacing": spacing_range, "width": image_width, "type": type, "subtype": subtype, "ground": ground,
        "transform": transform,
    }  # fmt: skip
    if pool is None:
        from loaderd import digits as of_catalog

        checked(options)  # before the catalog is opened
        if labels is not None and not (isinstance(labels, str) and labels):
            raise UsageError(f"labels={_short(labels)}: must be the name of a label, such as 'label' for MNIST's")
        pool = of_catalog.once(database, labels)
    return pool.sequencer(options).image(numbers, generator(seed))


def numbers_of(digits: str | Iterable[int]) -> list[int]:
    """Return digits as a list of whole numbers from 0 to 9.

    Raises:
        UsageError: If there is none, or something else among them.
    """
    given: list[Any]
    if isinstance(digits, str):
        given = [int(one) if one in "0123456789" else one for one in digits]
    else:
        try:
            given = list(digits)
        except TypeError:
            raise UsageError(f"digits={_short(digits)}: must be a text such as '0123' or a list of whole numbers from 0 to 9") from None
    if not given:
        raise UsageError("digits: there is none; a sequence has at least one, such as '0123'")
    found = []
    for place, one in enumerate(given):
        number = _whole(one)
        if number is None or not 0 <= number <= 9:
            raise UsageError(f"digits[{place}]={_short(one)}: must be a whole number from 0 to 9")
        found.append(number)
    if len(found) > MOST_DIGITS:
        raise UsageError(f"digits: there are {len(found)}; at most {MOST_DIGITS} go into a sequence")
    return found


def generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """Return the generator of a seed: Philox. One that is given is used as it is."""
    if isinstance(seed, np.random.Generator):
        return seed
    if seed is None:
        return np.random.Generator(np.random.Philox())
    number = _whole(seed)
    if number is None:
        raise UsageError(f"seed={_short(seed)}: must be a whole number, a numpy.random.Generator, or None")
    return np.random.Generator(np.random.Philox(key=[number % 2**64, 0]))


def _words(generator: np.random.Generator, count: int) -> Words:
    """Return what ``generator.integers(0, 2**64, count, np.uint64)`` returns; of Philox, 5 µs sooner."""
    if isinstance(generator.bit_generator, np.random.Philox):
        return generator.bit_generator.random_raw(count)
    return generator.integers(0, 2**64, count, np.uint64)


def _pair(name: str, value: object, low: int, high: int, must: str) -> tuple[int, int]:
    ends = [_whole(one) for one in value] if isinstance(value, tuple | list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] < low or ends[1] > high:
        raise UsageError(f"{name}={_short(value)}: must be {must}, from {low} to {high}")
    if ends[0] > ends[1]:
        raise UsageError(f"{name}={_short(value)}: is upside down; the smaller number comes first")
    return ends[0], ends[1]


def _whole(value: object) -> int | None:
    """Return a whole number, also numpy's, as int; None for all else. True is none, and neither is 3.0."""
    if type(value) is int:
        return value
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 and text.isprintable() else ascii(text[:60]) + "…"
