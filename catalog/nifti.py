"""NIfTI volumes → images, and label volumes → segments. NIfTI-1 and NIfTI-2 in one file, either byte order, plain or gzip'd.

Each slice along the third dimension is an image, rows and columns as the data lie in memory: the first axis runs fastest, so a slice is
(dim 2, dim 1) in C order. Of a 4-D volume frame = t * slices + k. The affine is the sform if it is coded, else the qform, else there is
none; positions and orientations are given in DICOM's patient coordinates, which run to the left and to the back (LPS) where NIfTI's
run to the right and to the front (RAS).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.cache import Content, open_content
from catalog.errors import FileError
from catalog.records import Drawn, Frame, Instance, segment

FloatArray = npt.NDArray[np.float64]

# datatype codes of nifti1.h; what is no number that a feed could give is refused by its name
NUMBERS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
OTHERS = {
    1: "single bits", 32: "complex numbers", 128: "RGB colours", 1536: "128-bit floats", 1792: "complex numbers", 2048: "complex numbers",
    2304: "RGBA colours",
}  # fmt: skip
MILLIMETRES = {1: 1_000.0, 2: 1.0, 3: 0.001}  # xyzt_units: metre, millimetre, micrometre; an unknown unit is taken for mm, as all tools do
MOST_FRAMES = 1 << 20
MOST_FRAME_BYTES = 1 << 28
MOST_VALUES = 1_024  # different ones in a label volume; FreeSurfer's largest atlas has some 250
MOST_DRAWN = 200_000
SAME_MM = 1e-3


@dataclass(frozen=True, slots=True)
class _Volume:
    """What a header says. Lengths are in mm."""

    shape: tuple[int, int, int, int]
    flat: bool  # has no third dimension, so its extent along it means nothing
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: FloatArray | None  # (4, 4), indices → mm, RAS
    spacing: tuple[float, float, float] | None  # along dim 1, 2, 3

    @property
    def frame_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def frames(self) -> int:
        return self.shape[2] * self.shape[3]

    @property
    def size_text(self) -> str:
        return "×".join(map(str, self.shape if self.shape[3] > 1 else self.shape[:3]))


def read_images(path: Path, options: Mapping[str, Any]) -> Instance:
    """Return the slices of a volume as images; identifiers are empty, since NIfTI has none.

    A gzip'd file is decompressed to its end, since nothing else says whether it is whole; with `options` ``{"hash": False}`` nothing is
    hashed, and of a plain file only the header is read.

    Raises:
        FileError: ``not-nifti``; ``truncated``; ``no-decoder`` without nibabel; ``unreadable`` for what is damaged or cannot be fed:
            a .hdr/.img pair, complex, RGB and 128-bit values, more than four dimensions.
    """
    hashing = options.get("hash", True)
    with open_content(path) as content:
        volume = _read_header(content)
        hashes: list[bytes | None] = []
        if hashing or content.coding:
            for _ in range(volume.frames):
                stored = content.take(volume.frame_bytes)
                hashes.append(_hash(stored, volume.dtype) if hashing else None)
            content.finish()
        else:
            hashes = [None] * volume.frames
    return Instance(
        patient_id="", study_instance_uid="", series_instance_uid="", sop_instance_uid="", sop_class_uid="", modality="",
        series_number=None, study_date="", instance_number=None, images_in_acquisition=None, frame_of_reference_uid="",
        transfer_syntax_uid="", number_of_frames=volume.frames, frames=_frames(volume, hashes), coding=content.coding,
    )  # fmt: skip


def read_annotations(path: Path, options: Mapping[str, Any]) -> list[Drawn]:
    """Return a label volume's segments: one for each slice and value that is there. Value 0 is the background.

    A slice without a value gives no segment for it: nothing to learn from would be one row for each label and slice.

    Options:
        image_path: the image file that it belongs to, relative to `root`, or a list of them (the channels of one case, which share its
            geometry): a segment is given for the images of each.
        root: the root's folder. Each image's header is compared: where shape or affine (at the volume's corners, 1e-3 mm) differ,
            ``refers_to["mismatch"]`` says how.
        channels: how many images a 4-D image file holds of each slice; if as many as its fourth dimension, a 3-D label volume is for all.
        labels: value → structure, such as ``{"1": "liver"}``; ``"1,2"`` is a structure of both. A value without is ``label <value>``.
        reader: who drew it; ``manual``.

    Raises:
        FileError: As `read_images`; ``not-labels`` for values that are no whole numbers, or more than 1,024 different ones.
    """
    paths = options.get("image_path") or ()
    paths = [paths] if isinstance(paths, str) else list(paths)
    regions = [(key, [int(value) for value in key.split(",")], name) for key, name in options.get("labels", {}).items()]
    with open_content(path) as content:
        volume = _read_header(content)
        images = [_matched(volume, at, options) for at in paths] or [({}, [0])]
        affine = None if volume.affine is None else volume.affine.ravel().tolist()
        about = {"shape": list(volume.shape[: 4 if volume.shape[3] > 1 else 3]), "affine": affine}
        found: list[Drawn] = []
        values: set[int] = set()
        for frame in range(volume.frames):
            with np.errstate(all="ignore"):  # a signalling NaN would warn
                labels = _labels(np.frombuffer(content.take(volume.frame_bytes), volume.dtype), volume)
            here = _values(labels) - {0}
            values |= here
            if len(values) > MOST_VALUES:
                raise FileError("not-labels", f"more than {MOST_VALUES} different values, so this is an image and no label volume")
            named = {value for _, region, _ in regions for value in region}
            wanted = [(key, region, name) for key, region, name in regions if here & set(region)]
            wanted += [(str(value), [value], f"label {value}") for value in sorted(here - named)]
            for key, region, name in wanted:
                inside = labels == region[0] if len(region) == 1 else np.isin(labels, region)
                drawn = segment(inside.reshape(volume.shape[1], volume.shape[0]))
                for number, (where, starts) in enumerate(images):
                    for start in starts:
                        at = start + frame
                        refers_to = {**where, "frame": at, "value": region[0] if len(region) == 1 else region, **about}
                        reader = options.get("reader") or "manual"
                        found.append(Drawn(f"{number}/{at}/{key}", name, reader, "segment", refers_to, segment=drawn))
            if len(found) > MOST_DRAWN:
                raise FileError("not-labels", f"more than {MOST_DRAWN} segments in one file; split it, or see whether it holds labels")
        content.finish()
    return found


def _matched(labels: _Volume, path: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Return what is said of an image file, and at which of its frames the label volume begins: several for several channels."""
    try:
        with open_content(Path(options["root"], path)) as content:
            image = _read_header(content)
    except FileError:  # it is refused itself, or not there, so nothing is paired with it
        return {"path": path}, [0]
    starts = [0]
    if labels.shape[3] == 1 < image.shape[3] == options.get("channels"):
        starts = [channel * image.shape[2] for channel in range(image.shape[3])]
    elif labels.shape[3] != image.shape[3]:
        return {"path": path, "mismatch": f"shape {labels.size_text}, the image has {image.size_text}"}, [0]
    if labels.shape[:3] != image.shape[:3]:
        return {"path": path, "mismatch": f"shape {labels.size_text}, the image has {image.size_text}"}, [0]
    if (labels.affine is None) != (image.affine is None):
        says = ("the image has an affine, the labels have none", "the labels have an affine, the image has none")
        return {"path": path, "mismatch": says[image.affine is None]}, [0]
    corners = np.array(np.meshgrid(*((0, size - 1) for size in labels.shape[:3]), [1])).reshape(4, -1)
    apart = float(np.linalg.norm((_grid(labels) - _grid(image))[:3] @ corners, axis=0).max())
    if not apart <= SAME_MM:
        return {"path": path, "mismatch": f"affine: its voxels lie up to {apart:.3g} mm from the image's"}, [0]
    return {"path": path}, starts


def _grid(volume: _Volume) -> FloatArray:
    return volume.affine if volume.affine is not None else np.diag([*(volume.spacing or (1.0, 1.0, 1.0)), 1.0])


def _labels(stored: npt.NDArray[Any], volume: _Volume) -> npt.NDArray[Any]:
    """Return label values as whole numbers."""
    labels: npt.NDArray[Any] = stored
    if volume.slope != 1 or volume.intercept != 0:
        labels = stored.astype(np.float64) * volume.slope + volume.intercept
    if labels.dtype.kind == "f":
        # Beyond 2^31 a float32 holds no odd numbers any more, and no table of labels any names.
        if not (np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
            raise FileError("not-labels", "a value is no whole number, so this is an image and no label volume")
        if float(np.abs(labels).max()) < 2**31:
            return labels.astype(np.int64)
    elif max(-int(labels.min()), int(labels.max())) < 2**31:
        return labels
    raise FileError("not-labels", "a value of 2^31 or more, so this is an image and no label volume")


def _values(labels: npt.NDArray[Any]) -> set[int]:
    low, high = int(labels.min()), int(labels.max())
    if low == high:
        return {low}
    if high - low < 1 << 16:  # 15 times faster than sorting
        return {value + low for value in np.flatnonzero(np.bincount(labels.astype(np.int64) - low)).tolist()}
    return set(np.unique(labels).tolist())


def _hash(stored: bytes, dtype: np.dtype[Any]) -> bytes:
    values = np.frombuffer(stored, dtype)
    return hashlib.sha256(values.astype(dtype.newbyteorder("<"), copy=False).data).digest()


def _frames(volume: _Volume, hashes: list[bytes | None]) -> tuple[Frame, ...]:
    columns, rows, slices, _ = volume.shape
    orientation = None
    origin = step = normal = np.zeros(3)
    if volume.affine is not None:
        along_row, along_column, step, origin = (np.diag([-1.0, -1.0, 1.0]) @ volume.affine[:3]).T
        along_row, along_column = along_row / np.linalg.norm(along_row), along_column / np.linalg.norm(along_column)
        normal = np.cross(along_row, along_column)
        orientation = (*along_row.tolist(), *along_column.tolist())
    spacing = None if volume.spacing is None else (volume.spacing[1], volume.spacing[0])
    thickness = None if volume.flat or volume.spacing is None else volume.spacing[2]
    places = [None if orientation is None else origin + k * step for k in range(slices)]
    return tuple(
        Frame(
            frame=frame, rows=rows, columns=columns, samples_per_pixel=1, photometric="MONOCHROME2",
            bits_stored=volume.dtype.itemsize * 8, pixel_spacing=spacing,
            image_position=None if place is None else (float(place[0]), float(place[1]), float(place[2])),
            image_orientation=orientation, position=None if place is None else float(place @ normal), slice_thickness=thickness,
            trigger_time=None, slope=volume.slope, intercept=volume.intercept, window_center=None, window_width=None,
            pixel_hash=pixel_hash, offset=volume.offset + frame * volume.frame_bytes, length=volume.frame_bytes, dtype=volume.dtype.str,
        )
        for frame, pixel_hash in enumerate(hashes)
        for place in (places[frame % slices],)
    )  # fmt: skip


def _read_header(content: Content) -> _Volume:
    """Return what the header says, and leave `content` at the first voxel."""
    try:
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header
    except ImportError:
        raise FileError("no-decoder", "NIfTI files are read with nibabel, which is missing: pip install 'scanfeed[nifti]'") from None
    try:
        block = content.take(4)
        order = "<" if block[:1] in (b"\x5c", b"\x1c") else ">"
        size = int.from_bytes(block, "little" if order == "<" else "big")
        if size in (348, 540):
            block += content.take(size - 4)
    except FileError as error:
        if error.code == "truncated":
            raise FileError("not-nifti", "too short for a header, so this is no NIfTI file") from None
        raise
    if size not in (348, 540):
        raise FileError("not-nifti", "no NIfTI-1 or NIfTI-2 header at its start, so this is no NIfTI file")
    magic = block[344:348] if size == 348 else block[4:12]
    if magic in (b"ni1\0", b"ni2\0\r\n\032\n"):
        raise FileError("unreadable", "the header of a .hdr/.img pair, which is not read; save the volume as one .nii file")
    if magic not in (b"n+1\0", b"n+2\0\r\n\032\n"):
        raise FileError("not-nifti", "its magic is not NIfTI's (older Analyze files do not say what their axes are); save it as .nii")
    try:
        with np.errstate(all="ignore"):
            header: Any = Nifti1Header if size == 348 else Nifti2Header
            volume = _parse(header(block, order, check=False))
    except FileError:
        raise
    except Exception as error:  # a damaged header can raise anything in the parser
        raise FileError("unreadable", f"its header cannot be parsed ({type(error).__name__})") from None
    if volume.offset < size + 4:
        raise FileError("unreadable", f"vox_offset is {volume.offset}, inside the header, so its voxels cannot be found")
    content.expect(volume.offset + volume.frames * volume.frame_bytes)
    content.skip(volume.offset - size)
    return volume


def _parse(header: Any) -> _Volume:
    dims = [int(size) for size in header["dim"]]
    if not 2 <= dims[0] <= 7:
        raise FileError("unreadable", f"dim[0] is {dims[0]} where 2 to 4 dimensions are images; its shape is not known")
    if any(size > 1 for size in dims[5 : dims[0] + 1]):
        raise FileError("unreadable", f"{dims[0]} dimensions; a volume of images has at most four; save it as several files")
    used = [*dims[1 : dims[0] + 1][:4], 1, 1]
    shape = (used[0], used[1], used[2], used[3])
    if min(dims[1 : dims[0] + 1]) < 1:
        raise FileError("unreadable", "a dimension below 1, so its shape is not known")
    code = int(header["datatype"])
    if code not in NUMBERS:
        what = f"{OTHERS[code]} (datatype {code}), which no feed gives; convert them" if code in OTHERS else f"unknown datatype {code}"
        raise FileError("unreadable", f"its voxels are {what}")
    dtype = np.dtype(NUMBERS[code]).newbyteorder(header.endianness)
    if shape[0] * shape[1] * dtype.itemsize > MOST_FRAME_BYTES or shape[2] * shape[3] > MOST_FRAMES:
        raise FileError(
            "unreadable", f"its header promises {'×'.join(map(str, shape))} voxels, which is beyond what is read; it may be damaged"
        )
    offset = float(header["vox_offset"])
    if not offset.is_integer() or not 0 <= offset < 2**62:
        raise FileError("unreadable", "vox_offset is no whole number, so its voxels cannot be found")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        slope, intercept = 1.0, 0.0
    elif not np.isfinite(intercept):
        raise FileError("unreadable", "scl_slope is given and scl_inter is no number, so its values have no meaning")

    scale = MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    steps = np.abs(np.asarray(header["pixdim"], np.float64)[1:4])
    if dims[0] == 2:
        steps[2] = 1.0  # says nothing, and may hold anything
    affine = _affine(header, steps)
    if affine is not None:
        affine[:3] *= scale
        steps = np.linalg.norm(affine[:3, :3], axis=0)
    else:
        steps = steps * scale
    spacing = (float(steps[0]), float(steps[1]), float(steps[2])) if np.isfinite(steps).all() and (steps > 0).all() else None
    return _Volume(shape, dims[0] == 2, dtype, int(offset), slope, intercept, affine, spacing)


def _affine(header: Any, steps: FloatArray) -> FloatArray | None:
    """Return sform, else qform, in the file's unit; None if neither is coded, or the one that is maps volumes onto less than that."""
    if int(header["sform_code"]) > 0:
        affine = header.get_sform()
    elif int(header["qform_code"]) > 0:
        header["pixdim"][0] = -1.0 if header["pixdim"][0] < 0 else 1.0  # nifti1.h: anything but -1 counts as 1
        header["pixdim"][1:4] = steps
        try:
            affine = header.get_qform()
        except ValueError:  # no unit quaternion
            return None
    else:
        return None
    affine = np.array(affine, np.float64)
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        return None
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() < 1e-9:  # a nanometre, if the unit is the metre
        return None
    return affine if abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6 else None
