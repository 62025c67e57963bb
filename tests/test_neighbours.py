"""Neighbours along the slice normal: who is whose by geometry alone, what counts as none, and that the trainer gets those pixels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psycopg
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import ingest
from catalog.database import open_database
from loaderd import Feed
from loaderd.neighbours import SAME_MM, WIDEST, Neighbours, lines, with_neighbours

PLACED = """
SELECT i.id, n.series_id, i.phase, i.position, i.frame FROM image i JOIN instance n ON n.id = i.instance_id
ORDER BY n.series_id, i.phase, i.position, i.frame
"""
FIELDS = np.dtype([("id", ">i8"), ("line", ">i8"), ("at", ">f8"), ("number", ">i8"), ("frame", ">i8"), ("tie", ">i8")])


def by_hand(images: Sequence[tuple[Any, ...]], context: int) -> dict[int, list[int]]:
    """The same as `lines`, image by image."""
    found = {}
    for line in {image[1] for image in images}:
        members = sorted((image for image in images if image[1] == line), key=lambda image: image[2])
        places: list[list[Any]] = []
        for image in members:
            if places and image[2] - places[-1][-1][2] <= SAME_MM:
                places[-1].append(image)
            else:
                places.append([image])
        steps = [after[0][2] - before[-1][2] for before, after in itertools.pairwise(places)]
        places = [sorted(place, key=lambda image: image[3:]) for place in places]
        for at, place in enumerate(places):
            for turn, image in enumerate(place):
                around = []
                for away in [step for step in range(-context, context + 1) if step]:
                    there = at + away
                    between = steps[min(at, there) : max(at, there)]
                    if 0 <= there < len(places) and all(step <= WIDEST * sorted(steps)[(len(steps) - 1) // 2] for step in between):
                        around.append(places[there][min(turn, len(places[there]) - 1)][0])
                    else:
                        around.append(0)
                found[image[0]] = around
    return found


positions = st.one_of(st.integers(-6, 12).map(float), st.integers(0, 20).map(lambda at: at * 2.5), st.floats(-30, 30))


@given(
    st.lists(st.tuples(st.integers(1, 3), positions, st.integers(0, 2), st.integers(0, 2)), max_size=40), st.integers(1, 3), st.randoms()
)
def test_lines_are_those_found_image_by_image(drawn: list[Any], context: int, random: Any) -> None:
    """Whatever lines, distances, ties and gaps there are, and in any order of rows: the neighbours are those found one by one."""
    images = [(number, line, at, turn, frame, number) for number, (line, at, turn, frame) in enumerate(drawn, start=1)]
    shuffled = random.sample(images, len(images))
    ids, around = lines(np.array(shuffled, FIELDS), context)
    assert dict(zip(ids.tolist(), around.tolist(), strict=True)) == by_hand(images, context)


def test_a_missing_slice_ends_the_line() -> None:
    """Across a gap of two slices there is no neighbour, on either side, and nothing beyond it; a little jitter is no gap."""
    at = [0.0, 10.4, 20.0, 39.9, 50.0]
    ids, around = lines(np.array([(n, 1, mm, 0, 0, n) for n, mm in enumerate(at, start=1)], FIELDS), 2)
    assert dict(zip(ids.tolist(), around.tolist(), strict=True)) == {
        1: [0, 0, 2, 3], 2: [0, 1, 3, 0], 3: [1, 2, 0, 0], 4: [0, 0, 5, 0], 5: [0, 4, 0, 0],
    }  # fmt: skip


def test_a_hundredth_of_a_millimetre_is_no_step() -> None:
    """Two echoes of a slice, 0.006 mm apart, are at one place, and each goes with its own of the next slice; 0.02 mm are two places."""
    at = [0.0, 0.006, 8.0, 8.006]
    ids, around = lines(np.array([(n, 1, mm, n % 2, 0, n) for n, mm in enumerate(at, start=1)], FIELDS), 1)
    assert dict(zip(ids.tolist(), around.tolist(), strict=True)) == {1: [0, 3], 2: [0, 4], 3: [1, 0], 4: [2, 0]}
    ids, around = lines(np.array([(1, 1, 0.0, 0, 0, 1), (2, 1, 0.02, 0, 0, 2)], FIELDS), 1)
    assert dict(zip(ids.tolist(), around.tolist(), strict=True)) == {1: [0, 2], 2: [1, 0]}


def neighbours_of(conn: psycopg.Connection[Any], context: int = 1) -> dict[int, list[int]]:
    """All images of the catalog with their neighbours."""
    ids = [image for (image,) in conn.execute("SELECT id FROM image ORDER BY md5(id::text)")]
    return dict(zip(ids, Neighbours(context).of(conn, ids).tolist(), strict=True))


@pytest.mark.usefixtures("ingested")
def test_neighbours_are_next_in_space_at_the_same_phase(conn: psycopg.Connection[Any]) -> None:
    """In real rows: the slices before and after, of the same series and phase; whatever numbers files have, and in any portions."""
    expected: dict[int, list[int]] = {}
    groups: dict[Any, list[int]] = {}
    for image, series, phase, _, _ in conn.execute(PLACED):
        groups.setdefault((series, phase), []).append(image)
    for stack in groups.values():
        padded = [0, 0, *stack, 0, 0]
        expected |= {image: [*padded[at : at + 2], *padded[at + 3 : at + 5]] for at, image in enumerate(stack)}
    assert len(groups) == 12 and neighbours_of(conn, 2) == expected
    conn.execute("UPDATE instance SET instance_number = 1000 - id, sop_instance_uid = md5(id::text)")
    found = Neighbours(2)
    for start in range(0, len(expected), 5):
        some = list(expected)[start : start + 5]
        assert found.of(conn, some).tolist() == [expected[image] for image in some]


@pytest.mark.usefixtures("ingested")
def test_what_is_no_neighbour(conn: psycopg.Connection[Any]) -> None:
    """An image without a present file, a revoked one, one of another size, spacing or direction is as if it were not there."""
    stack = [image for (image,) in conn.execute("SELECT id FROM image WHERE phase = 0 ORDER BY instance_id < 17 DESC, position LIMIT 4")]
    first, second, third, _ = stack

    def around() -> list[int]:
        return Neighbours(1).of(conn, [second]).tolist()[0]

    assert around() == [first, third]
    for change, back in (
        ("UPDATE location SET preferred = false WHERE image_id = %s", "UPDATE location SET preferred = true WHERE image_id = %s"),
        (
            "INSERT INTO flag (rule, severity, detail, image_id, raised_by, revokes) VALUES ('CONSENT', 'error', 'x', %s, 'me', true)",
            "UPDATE flag SET state = 'resolved', closed_at = now() WHERE image_id = %s",
        ),
        ("UPDATE image SET rows = rows + 1 WHERE id = %s", "UPDATE image SET rows = rows - 1 WHERE id = %s"),
        ("UPDATE image SET row_spacing = row_spacing * 2 WHERE id = %s", "UPDATE image SET row_spacing = row_spacing / 2 WHERE id = %s"),
        ("UPDATE image SET image_orientation[1] = 0.5 WHERE id = %s", "UPDATE image SET image_orientation[1] = -0.104592 WHERE id = %s"),
    ):
        conn.execute(change, [third])
        assert around() == [first, 0], change  # the fourth is 20 mm away
        conn.execute(back, [third])
        assert around() == [first, third], back
    # Last digits that scanners vary, and numbers that are none.
    conn.execute("UPDATE image SET image_orientation[1] = image_orientation[1] + 1e-6, position = position + 1e-3 WHERE id = %s", [third])
    conn.execute("UPDATE image SET row_spacing = 1e300, image_orientation[2] = '-infinity', position = 'NaN' WHERE id = %s", [first])
    assert around() == [0, third]
    assert Neighbours(1).of(conn, [first]).tolist() == [[0, 0]]


@pytest.mark.usefixtures("ingested")
def test_rows_are_what_the_catalog_says_now(conn: psycopg.Connection[Any]) -> None:
    """Neighbours stay until `forget`, but one that is revoked meanwhile, or whose file is gone, comes as null."""
    stack = [image for (image,) in conn.execute("SELECT id FROM image WHERE phase = 0 ORDER BY instance_id < 17 DESC, position LIMIT 4")]
    found = Neighbours(1)
    before = [json.loads(row) for row in found.rows(conn, stack)]
    assert [[one and one[0] for one in row] for row in before] == [
        [None, stack[1]], [stack[0], stack[2]], [stack[1], stack[3]], [stack[2], None],
    ]  # fmt: skip
    path, size, offset = before[0][1][3], before[0][1][4], before[0][1][6]
    assert (path, size, offset) == conn.execute(
        "SELECT f.path, f.size, l.byte_offset FROM location l JOIN file f ON f.id = l.file_id WHERE l.image_id = %s", [stack[1]]
    ).fetchone()
    conn.execute(
        "INSERT INTO flag (rule, severity, detail, image_id, raised_by, revokes) VALUES ('X', 'error', 'x', %s, 'me', true)", [stack[0]]
    )
    conn.execute("UPDATE location SET preferred = false WHERE image_id = %s", [stack[2]])
    assert [json.loads(row) for row in found.rows(conn, stack)] == [before[0], [None, None], [before[2][0], before[2][1]], [None, None]]
    found.forget()
    # What is left are two slices, and two say nothing about what distance is usual.
    assert found.of(conn, stack).tolist() == [[0, 0], [0, stack[3]], [0, 0], [stack[1], 0]]
    assert with_neighbours([(b"[1, [2]]", b"bits")], [b"[null, [3]]"]) == [(b"[1, [2], [null, [3]]]", b"bits")]


def test_frames_of_volumes(database_url: str, conn: psycopg.Connection[Any], tmp_path: Path) -> None:
    """Slices of a 4-D volume have those of the same moment beside them; without an affine frames go by their number, as a clip's do."""
    data = np.arange(6 * 5 * 4 * 3, dtype=np.int16).reshape(6, 5, 4, 3)
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.0, -3.0, 1.0])), tmp_path / "placed.nii")
    bare = nib.Nifti1Image(data[..., 0], None)
    bare.header["sform_code"], bare.header["qform_code"] = 0, 0
    nib.save(bare, tmp_path / "bare.nii")
    with open_database(database_url) as db:
        ingest.ingest(db, tmp_path, layout="nifti", jobs=1)
    frames = {
        (path, frame): image
        for path, frame, image in conn.execute(
            "SELECT f.path, i.frame, i.id FROM image i JOIN location l ON l.image_id = i.id JOIN file f ON f.id = l.file_id"
        )
    }
    name = {image: key for key, image in frames.items()}
    found = {name[image]: [name[one][1] if one else None for one in around] for image, around in neighbours_of(conn).items()}
    assert len(found) == 16
    for moment in range(3):
        # Position is along row × column; here slices run the other way.
        first = 4 * moment
        expected = {
            first: [first + 1, None],
            first + 1: [first + 2, first],
            first + 2: [first + 3, first + 1],
            first + 3: [None, first + 2],
        }
        for frame, around in expected.items():
            assert found["placed.nii", frame] in (around, around[::-1])
    assert [found["bare.nii", frame] for frame in range(4)] == [[None, 1], [0, 2], [1, 3], [2, None]]
    # A multi-frame object without functional groups says where its first frame lies, and nothing of the others.
    conn.execute("UPDATE image SET position = 0 WHERE id = %s", [frames["bare.nii", 0]])
    assert neighbours_of(conn)[frames["bare.nii", 0]] == [0, frames["bare.nii", 1]]


@pytest.mark.usefixtures("ingested")
def test_the_trainer_gets_the_neighbours_pixels(conn: psycopg.Connection[Any]) -> None:
    """`context=1` gives the slice before, the image and the slice after as channels; at the ends, as asked, zeros or the image again."""
    paths: dict[int, Path] = {}
    for image, url, path in conn.execute(
        "SELECT i.id, pl.url, pl.path FROM image i JOIN location l ON l.image_id = i.id JOIN place pl ON pl.file_id = l.file_id"
    ):
        paths[image] = Path(url, path)
    around = neighbours_of(conn)

    def pixels(image: int) -> np.ndarray[Any, Any]:
        return pydicom.dcmread(paths[image]).pixel_array.astype(np.float32)

    asked: dict[str, Any] = {"batch_size": 12, "channels": "first", "context": 1, "where": "phase = 1"}
    with Feed(**asked, context_ends="zero") as zero, Feed(**asked) as repeat:  # one daemon serves both
        for feed in (zero, repeat):
            [batch] = feed.epoch()
            for image, planes in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                before, after = around[image]
                other = pixels(image) if feed is repeat else np.zeros((64, 64), np.float32)
                assert np.array_equal(planes[1], pixels(image))
                assert np.array_equal(planes[0], pixels(before) if before else other)
                assert np.array_equal(planes[2], pixels(after) if after else other)
            assert len(batch.images) == 12


def test_real_studies(database_url: str, conn: psycopg.Connection[Any], sunnybrook: Path) -> None:
    """Of the two real studies each image has the slices 10 mm before and after, though no two files share a frame of reference."""
    with open_database(database_url) as db:
        ingest.ingest(db, sunnybrook, jobs=1)
    placed = {image: (series, phase, position) for image, series, phase, position, _ in conn.execute(PLACED)}
    found = neighbours_of(conn)
    assert sum(not before for before, _ in found.values()) == sum(not after for _, after in found.values()) == 40  # 2 studies × 20 phases
    for image, around in found.items():
        for neighbour, away in zip(around, (-10, 10), strict=True):
            if neighbour:
                assert placed[neighbour][:2] == placed[image][:2]
                assert placed[neighbour][2] - placed[image][2] == pytest.approx(away, abs=0.01)
