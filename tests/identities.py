"""What would tell who somebody is: 18 kinds of it, made for each place where one can stand, and a search that finds each of them again.

The kinds are those of 45 CFR 164.514(b)(2)(i), the identifiers that HIPAA's Safe Harbor takes out. All are invented: names of syllables,
numbers of a random generator that begins with the kind and the place. A hit therefore says where a value came from.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import quopri
import random
import re
import struct
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache

# Each word begins with these two letters, so that a search through megabytes looks at few places.
MARK = "zq"


def _word(rng: random.Random) -> str:
    return (MARK + "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(5))).capitalize()


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(count - 1))


def _number(prefix: str) -> Callable[[random.Random], str]:
    return lambda rng: f"{prefix}-{_word(rng)}-{_digits(rng, 4)}"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "name": lambda rng: f"{_word(rng)}^{_word(rng)}",
    "place": lambda rng: f"{_word(rng)} Lane {rng.randint(1, 99)}, {_word(rng)}",
    "date": lambda rng: f"19{rng.randint(20, 79)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}",
    "phone": lambda rng: f"+41 {_digits(rng, 2)} {_digits(rng, 3)} {_digits(rng, 4)}",
    "fax": lambda rng: f"+43 {_digits(rng, 3)} {_digits(rng, 7)}",
    "mail": lambda rng: f"{_word(rng).lower()}@{_word(rng).lower()}.example",
    "social security": lambda rng: f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}",
    "record": _number("MRN"),
    "plan": _number("HPB"),
    "account": _number("ACC"),
    "licence": _number("LIC"),
    "vehicle": lambda rng: f"{_word(rng).upper()}{_digits(rng, 5)}",  # 17 characters, as a chassis number has
    "device": _number("SN"),
    "url": lambda rng: f"https://{_word(rng).lower()}.example/{_word(rng).lower()}?id={_digits(rng, 5)}",
    "ip": lambda rng: ".".join(str(rng.randint(100, 254)) for _ in range(4)),
    "biometric": lambda rng: f"fingerprint:{_word(rng)}:{_digits(rng, 6)}",
    "photograph": lambda rng: f"face_{_word(rng)}.jpg",
    "other": lambda rng: f"{_word(rng)}/{_digits(rng, 6)}",
}
# Those without a word in them, which are looked for as numbers.
NUMBERS = ("date", "phone", "fax", "social security", "ip")


@cache
def value(kind: str, place: str) -> str:
    """Return what stands at a place: the same at each call, another for each kind and place; at most 64 characters."""
    return KINDS[kind](random.Random(f"{kind} {place}"))


_HEXADECIMAL = frozenset(bytes([digit]) for digit in b"0123456789abcdef")


class Planted:
    """What was planted: asks for a value is what plants it, so that nothing is looked for that is not there."""

    def __init__(self) -> None:
        self._words: dict[bytes, tuple[str, str]] = {}
        self._numbers: dict[tuple[str, str], dict[bytes, frozenset[bytes]]] = {}  # each form with the numbers in it
        self._parts: set[bytes] = set()  # all of these numbers

    def __call__(self, kind: str, place: str, shape: Callable[[str], str] = str) -> str:
        """Return a value, as `shape` writes it, to be put at a place."""
        text = shape(value(kind, place))
        for word in re.findall(MARK + "[a-z]{10}", text.lower()):
            if self._words.setdefault(word.encode(), (kind, place)) != (kind, place):
                raise ValueError(f"{word} stands at two places, so a hit would not say at which; name one of them otherwise")
        if kind in NUMBERS:
            parts = re.findall("[0-9]+", text)
            forms = {text, "".join(parts)} if kind != "ip" else {text}
            if kind == "date":
                year, month, day = text[:4], text[4:6], text[6:8]
                forms |= {f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}", f"{day}/{month}/{year}"}
            # Within a longer number, or within hexadecimal digits, it is another one.
            self._numbers[kind, place] = {form.encode(): frozenset(re.findall(b"[0-9]+", form.encode())) for form in forms}
            self._parts.update(*self._numbers[kind, place].values())
        return text

    def word(self, place: str) -> str:
        """Return one word, where nothing else can stand."""
        text = _word(random.Random(f"word {place}"))
        self._words[text.lower().encode()] = ("word", place)
        return text

    def __len__(self) -> int:
        return len(set(self._words.values()) | set(self._numbers))

    def found(self, data: bytes) -> set[tuple[str, str]]:
        """Return (kind, place) of all that stands in these bytes, however it is written there."""
        hits = set()
        for view in views(data):
            small = view.lower()
            for match in re.finditer(MARK.encode() + b"[a-z]{10}", small):
                if match[0] in self._words:
                    hits.add(self._words[match[0]])
            there = self._parts.intersection(re.findall(b"[0-9]+", small))
            for at, forms in self._numbers.items() if there else ():
                if at not in hits and any(numbers <= there and _alone(form, small) for form, numbers in forms.items()):
                    hits.add(at)
        return hits


def _alone(number: bytes, data: bytes) -> bool:
    """Whether a number stands there and is no part of a longer one, or of hexadecimal digits."""
    at = data.find(number)
    while at >= 0:
        end = at + len(number)
        if data[max(at - 1, 0) : at] not in _HEXADECIMAL and data[end : end + 1] not in _HEXADECIMAL:
            return True
        at = data.find(number, at + 1)
    return False


def views(data: bytes) -> Iterator[bytes]:
    """Yield what bytes say if they are text, UTF-16, hexadecimal, base64, quoted-printable, percent-encoded, escaped, or a container."""
    for inside in _opened(data):
        for view in _decoded(inside):
            yield view
            if b"\0" in view:  # UTF-16 and UTF-32 of what is ASCII
                yield view.replace(b"\0", b"")


def _decoded(data: bytes) -> Iterator[bytes]:
    yield data
    yield b" ".join(
        bytes.fromhex(run[start : start + (len(run) - start) // 2 * 2].decode())
        for run in re.findall(rb"[0-9a-fA-F]{12,}", data)
        for start in (0, 1)
    )
    runs = [run.translate(bytes.maketrans(b"-_", b"+/")) for run in re.findall(rb"[A-Za-z0-9+/_-]{11,}", data)]
    for start in range(4):
        yield b" ".join(_base64(run[start:]) for run in runs)
    if b"%" in data:
        yield urllib.parse.unquote_to_bytes(data)
    if b"=" in data:
        yield quopri.decodestring(data)
    if b"&" in data or b"\\" in data:
        text = html.unescape(data.decode("latin-1"))
        yield re.sub(r"\\(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text).encode("latin-1", "replace")


def _base64(run: bytes) -> bytes:
    whole = run if len(run) % 4 != 1 else run[:-1]
    return base64.b64decode(whole + b"=" * (-len(whole) % 4))


def _opened(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """Yield what a container holds, else the bytes themselves; of a picture what is no pixel."""
    if depth > 4:
        raise ValueError("containers within containers")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        yield b"\n".join(_chunks(data))
    elif data[:2] == b"\x1f\x8b":
        yield data[:512]  # its header may hold a name
        yield from _opened(gzip.decompress(data), depth + 1)
    elif data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from _opened(archive.read(name), depth + 1)
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                yield repr((member.name, member.uname, member.gname, member.linkname, member.pax_headers)).encode()
                if (file := archive.extractfile(member)) is not None:
                    yield from _opened(file.read(), depth + 1)
    elif data[:8] == b"\x89HDF\r\n\x1a\n":
        yield data
        yield _hdf5(data)
    else:
        # Pictures within a page: what they say beside their pixels, whose bytes as text say anything.
        pictures = re.findall(rb"data:[a-z]+/[a-z+]+;base64,([A-Za-z0-9+/=]+)", data)
        for picture in pictures:
            yield from _opened(base64.b64decode(picture), depth + 1)
        yield re.sub(rb"(data:[a-z]+/[a-z+]+;base64,)[A-Za-z0-9+/=]+", rb"\1", data) if pictures else data


def _chunks(data: bytes) -> Iterator[bytes]:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            name, _, rest = body.partition(b"\0")
            for start in range(5):
                try:
                    yield name + b" " + zlib.decompress(rest[start:])
                except zlib.error:
                    continue
        if kind != b"IDAT":
            yield kind + body


def _hdf5(data: bytes) -> bytes:
    """All names, attributes and texts of an HDF5 file, which may lie compressed in it."""
    import h5py

    said: list[str] = []

    def visit(name: str, node: object) -> None:
        said.append(name)
        said.extend(f"{key}={item!r}" for key, item in node.attrs.items())  # type: ignore[attr-defined]
        if isinstance(node, h5py.Dataset) and node.dtype.kind in "OSU":
            said.extend(map(repr, node[()].ravel().tolist() if node.shape else [node[()]]))

    with h5py.File(io.BytesIO(data)) as file:
        said.extend(f"{key}={item!r}" for key, item in file.attrs.items())
        file.visititems(visit)
    return "\n".join(said).encode()
