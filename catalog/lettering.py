"""Text in pictures, set with Pillow's own font, which is there everywhere: measured, wrapped, cut, written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from PIL import ImageDraw, ImageFont

TEXT, RAISED, LINE_HEIGHT = 15, 10, 21  # px

_PLAIN = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "µ": "u", "μ": "u", "ß": "ss", "≤": "<=", "≥": ">="})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def runs(text: str) -> list[tuple[str, int]]:
    """Text as Pillow's own font can set it, in parts with their sizes: it has no accents, no × and no ²."""
    plain = "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter)).translate(_PLAIN)
    parts = enumerate(re.split(r"([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", plain))
    return [(part.translate(_RAISED), RAISED if number % 2 else TEXT) for number, part in parts if part]


def length(text: str) -> float:
    return sum(font(size).getlength(part) for part, size in runs(text))


def write(draw: ImageDraw.ImageDraw, x: float, y: int, lines: Sequence[str], colour: tuple[int, int, int]) -> int:
    """Write lines, one below the other, and return where the next one goes."""
    for line in lines:
        at = x
        for part, size in runs(line):
            draw.text((at, y), part, font=font(size), fill=colour)
            at += font(size).getlength(part)
        y += LINE_HEIGHT
    return y


def cut(text: str, width: float) -> str:
    text = one_line(text)
    if length(text) <= width:
        return text
    while text and length(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, width: float) -> list[str]:
    """Lines of at most a width; a word that is longer, such as a UID, is broken anywhere."""
    lines = [""]
    for word in one_line(text).split(" "):
        if lines[-1] and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
