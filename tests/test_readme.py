"""The five things of README.md work as they stand there."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tests import commands
from tests.processes import serving

FIRST_FEEDS = 4  # the first block of Python
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def write_digits(folder: Path) -> None:
    """Write 20 images of 28×28 px as MNIST does, with the labels 0 to 9."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *pixels.shape) + pixels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 20) + bytes(at % 10 for at in range(20)))


def test_what_users_do(database_url: str, studies: Path, tmp_path: Path, _forking: socket.socket) -> None:
    """Every command and Python block under "The five things" and four more sections, copied out in this order, runs without an error.

    The first commands are the installed programs, the first Feeds start daemons of their own; the others are spared these starts, which
    take longer than what they do.
    """
    titles = ("The five things", "Trainings that go on", "Know what you train on", "Sets that can be proved", "What the trainer gets")
    sections = [re.search(rf"^## {title}$(.*?)^## ", README, re.M | re.S) for title in titles]
    blocks = [found for section in sections if section for found in re.findall(r"^```(sh|python)\n(.*?)^```", section[1], re.M | re.S)]
    assert [kind for kind, _ in blocks] == ["sh", "sh", "sh", "sh", "python", "sh", "python", "sh", "sh", "sh", "sh", "sh",
                                           "sh", "python", "sh", "python", "sh", "sh"]  # fmt: skip
    write_digits(tmp_path / "mnist")
    installed = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = []
    with ExitStack() as stack:
        stack.enter_context(commands.programs(_forking, tmp_path / "bin", {"catalog": "catalog.cli", "loaderd": "loaderd"}))
        for number, (kind, written) in enumerate(blocks):
            # The words for the user's own folder and patient.
            text = (
                written.replace("/data/final_data", str(studies))
                .replace("SCD0000201", "SYN0002")
                .replace("/data/mnist", str(tmp_path / "mnist"))
            )
            if number == FIRST_FEEDS + 1:
                stack.enter_context(serving())
            command = ["sh", "-ec", text] if kind == "sh" else [sys.executable, "-c", text]
            environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{installed}" if number else installed}
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=400)
            assert done.returncode == 0, (text, done.stderr)
            printed.append(done.stdout)
    assert "48 images" in printed[0] and "nothing new" not in printed[0]
    assert (tmp_path / "overlay.png").stat().st_size > 10_000
    assert "ejection_fraction" in printed[3] and "SYN0003" in printed[3]
    assert re.search(r" 0  +0\n", printed[5])
    assert "unet-3" in printed[7] and "9f86d081" in printed[7] and "unet-3" in printed[8]
    assert "SERIES-INCOMPLETE" in printed[9] and "looked at it: is right" in printed[9]
    assert (tmp_path / "gallery").is_dir() and (tmp_path / "areas.png").stat().st_size > 10_000
    assert "looked at it: is right" in printed[11]
    assert "is what was frozen" in printed[12] and (tmp_path / "v1.h5").stat().st_size > 100_000
    assert "interpolated" in printed[14] and (tmp_path / "intensities.png").stat().st_size > 10_000
    assert "has 12 samples now" in printed[16] and (tmp_path / "augmented.png").stat().st_size > 10_000
    assert (tmp_path / "digits.png").stat().st_size > 1_000
