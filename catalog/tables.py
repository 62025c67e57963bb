"""The tables, in SQLAlchemy Core; each constraint says in its name or comment what it prevents.

The words are design words: patient, study, series and instance are the four DICOM levels; an image is one frame of an
instance; a location is where its pixels lie; an annotation is what a reader drew; a pairing says on which image.
Views, triggers and the login for SQL that users give are in the migrations, which a test holds against this page.
"""

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INT8MULTIRANGE, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True, comment="Surrogate key; means nothing outside this database.")


def _now(name: str, comment: str) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now(), comment=comment)


def _ref(name: str, target: str, comment: str, *, nullable: bool = False, index: bool = True, cascade: bool = False) -> Column[int]:
    key = ForeignKey(f"{target}.id", ondelete="CASCADE" if cascade else None)
    return Column(name, BigInteger, key, nullable=nullable, index=index, comment=comment)


# ------------------------------------------------------------------------------------------ storage and ingest

root = Table(
    "root",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="Short name of the storage place."),
    Column("url", Text, nullable=False, unique=True, comment="Absolute folder; files are relative to it: a moved root is one UPDATE."),
    _now("created_at", "When the root was first ingested."),
    CheckConstraint("name <> '' AND url <> ''", name="not_empty"),
    comment="A storage place with a name.",
)

ingest_run = Table(
    "ingest_run",
    metadata,
    _id(),
    _ref("root_id", "root", "What was ingested."),
    Column("layout", Text, nullable=False, comment="How images and annotations were found and paired: a name under catalog/layouts."),
    Column("state", Text, nullable=False, server_default="running", comment="running, finished, interrupted or failed."),
    Column("program_version", Text, nullable=False, comment="Version of scanfeed."),
    Column("host", Text, nullable=False, comment="Machine that read the files."),
    _now("started_at", "When it began."),
    Column("finished_at", DateTime(timezone=True), comment="When it ended; NULL while running, or when it was killed."),
    Column("files_seen", BigInteger, nullable=False, server_default="0", comment="Files of the layout found in the root."),
    Column("files_read", BigInteger, nullable=False, server_default="0", comment="Files new or changed, and therefore read."),
    Column("errors", BigInteger, nullable=False, server_default="0", comment="Rows of ingest_error of this run."),
    Column("hash", Text, nullable=False, server_default="full", comment="What of each file was hashed: full, head or none."),
    Column("fell_back", BigInteger, nullable=False, server_default="0", comment="DICOM files whose header was left to pydicom."),
    Column("undone_at", DateTime(timezone=True), comment="When what it brought was taken out again."),
    CheckConstraint("state IN ('running', 'finished', 'interrupted', 'failed')", name="state"),
    comment="One ingest that had something to do. An ingest that finds nothing new leaves no row.",
)

ingest_error = Table(
    "ingest_error",
    metadata,
    _id(),
    _ref("ingest_run_id", "ingest_run", "The run that met it.", cascade=True),
    Column("path", Text, nullable=False, comment="File or folder, relative to the root."),
    Column("stage", Text, nullable=False, comment="find, read, pair or mask."),
    Column("code", Text, nullable=False, comment="Short stable name of the error."),
    Column("message", Text, nullable=False, comment="What, so what, what to do. Never holds the value of an identifying tag."),
    _now("at", "When it was met."),
    CheckConstraint("stage IN ('find', 'read', 'pair', 'mask')", name="stage"),
    comment="What could not be taken in. Everything else went on.",
)

file = Table(
    "file",
    metadata,
    _id(),
    _ref("root_id", "root", "The storage place.", index=False),
    Column("path", Text, nullable=False, comment="Relative to the root, with / between folders."),
    Column("kind", Text, nullable=False, comment="What it holds: image, annotation, or other (a plan, a report)."),
    Column(
        "format",
        Text,
        nullable=False,
        server_default="dicom",
        comment="What reads it: dicom, contour, nifti, idx, raster, …; none: nothing.",
    ),
    Column("size", BigInteger, nullable=False, comment="Bytes, as catalogued."),
    Column("mtime_ns", BigInteger, nullable=False, comment="Modification time as catalogued, ns since 1970."),
    Column("state", Text, nullable=False, server_default="present", comment="present, missing (was there once) or unreadable."),
    Column(
        "read_as",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="CRC-32 of what its layout says about it (patient, structure, options); where that changes it is read again.",
    ),
    Column(
        "content_hash", LargeBinary, comment="sha256 of its bytes, or of the first 64 KiB and the size (--hash head); NULL: not asked for."
    ),
    # An object without images has no location, which else says what a file holds.
    _ref("instance_id", "instance", "The SOP object in it, if it has no image.", nullable=True, index=False),
    _ref("ingest_run_id", "ingest_run", "The run that last wrote this row.", index=False),
    _ref("first_run_id", "ingest_run", "The run that first found it.", nullable=True, index=False),
    UniqueConstraint("root_id", "path"),
    Index("ix_file_instance_id", "instance_id", postgresql_where=text("instance_id IS NOT NULL")),
    CheckConstraint("state IN ('present', 'missing', 'unreadable')", name="state"),
    CheckConstraint("kind IN ('image', 'annotation', 'other')", name="kind"),
    CheckConstraint("path <> '' AND left(path, 1) <> '/'", name="path_relative"),
    comment="A file of a root, with the size and time by which a change is noticed.",
)

# ------------------------------------------------------------------------------------------ the four DICOM levels

patient = Table(
    "patient",
    metadata,
    _id(),
    # Text, not a checked identifier: PatientID (0010,0020) is a free LO.
    Column("patient_id", Text, nullable=False, unique=True, comment="PatientID (0010,0020), or the layout's name for the patient."),
    Column("original_id", Text, comment="The name under which the annotations' source knows the patient (Sunnybrook: link.csv)."),
    comment="A patient.",
)

study = Table(
    "study",
    metadata,
    _id(),
    _ref("patient_id", "patient", "Whose study.", index=False),
    # UIDs are text as found: de-identified archives hold UIDs that break PS3.5 9.1; never validated, never rewritten.
    Column("study_instance_uid", Text, nullable=False, index=True, comment="StudyInstanceUID (0020,000D), as found."),
    Column("study_date", Text, nullable=False, server_default="", comment="StudyDate (0008,0020), as found: may be no date."),
    UniqueConstraint("patient_id", "study_instance_uid"),
    comment="A study. One UID under two patients is two rows and a finding.",
)

series = Table(
    "series",
    metadata,
    _id(),
    _ref("study_id", "study", "Its study.", index=False),
    Column("series_instance_uid", Text, nullable=False, index=True, comment="SeriesInstanceUID (0020,000E), as found."),
    Column("series_number", Integer, comment="SeriesNumber (0020,0011)."),
    Column("modality", Text, nullable=False, server_default="", comment="Modality (0008,0060)."),
    UniqueConstraint("study_id", "series_instance_uid"),
    comment="A series.",
)

instance = Table(
    "instance",
    metadata,
    _id(),
    _ref("series_id", "series", "Its series.", index=False),
    Column("sop_instance_uid", Text, nullable=False, index=True, comment="SOPInstanceUID (0008,0018), as found; empty when missing."),
    Column("sop_class_uid", Text, nullable=False, server_default="", comment="SOPClassUID (0008,0016)."),
    Column("instance_number", Integer, comment="InstanceNumber (0020,0013)."),
    Column("number_of_frames", Integer, nullable=False, comment="Frames; 0 for an object without pixels."),
    Column("images_in_acquisition", Integer, comment="ImagesInAcquisition (0020,1002), as claimed by the file."),
    Column("content_hash", LargeBinary, comment="sha256 over the pixel hashes of all frames; tells a re-encoding from a conflict."),
    Column("frame_of_reference_uid", Text, nullable=False, server_default="", comment="FrameOfReferenceUID (0020,0052), as found."),
    Column("burned_in_annotation", Text, nullable=False, server_default="", comment="BurnedInAnnotation (0028,0301)."),
    Column("identity_removed", Text, nullable=False, server_default="", comment="PatientIdentityRemoved (0012,0062)."),
    Column("over_89", Boolean, comment="Is the patient said to be older than 89? The age itself is not kept. NULL: nothing says."),
    Column(
        "identifying",
        ARRAY(Text),
        comment="Tags of identifying attributes that have a value, such as (0010,0010). The values are not kept. NULL: nobody looked yet.",
    ),
    Column("gantry_tilt", Double, comment="GantryDetectorTilt (0018,1120) in degrees."),
    Column(
        "other_meta_uid",
        Boolean,
        nullable=False,
        server_default="false",
        comment="MediaStorageSOPInstanceUID (0002,0003) is there and is not SOPInstanceUID (0008,0018).",
    ),
    Column(
        "surplus_bytes",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="Bytes of uncompressed Pixel Data beyond rows × columns × samples × bits × frames and one byte of padding.",
    ),
    # A second file with the same UID and the same pixels is a re-encoding: the same row. With other pixels it is another row.
    UniqueConstraint("series_id", "sop_instance_uid", "content_hash", postgresql_nulls_not_distinct=True),
    CheckConstraint("content_hash IS NULL OR length(content_hash) = 32", name="content_hash"),
    comment="One SOP object.",
)

image = Table(
    "image",
    metadata,
    _id(),
    _ref("instance_id", "instance", "The SOP object it is a frame of.", index=False),
    Column("frame", Integer, nullable=False, comment="Frame, counted from 0."),
    Column("rows", Integer, nullable=False, comment="Height in px."),
    Column("columns", Integer, nullable=False, comment="Width in px."),
    Column("samples_per_pixel", SmallInteger, nullable=False, server_default="1", comment="SamplesPerPixel (0028,0002)."),
    Column("photometric", Text, nullable=False, server_default="", comment="PhotometricInterpretation (0028,0004)."),
    Column("row_spacing", Double, comment="PixelSpacing (0028,0030), first value: mm between rows."),
    Column("column_spacing", Double, comment="PixelSpacing (0028,0030), second value: mm between columns."),
    Column("image_position", ARRAY(Double), comment="ImagePositionPatient (0020,0032): x, y, z in mm."),
    Column("image_orientation", ARRAY(Double), comment="ImageOrientationPatient (0020,0037): direction of a row, then of a column."),
    Column("position", Double, comment="mm along the slice normal: image_position · (row direction × column direction)."),
    Column("slice_thickness", REAL, comment="SliceThickness (0018,0050) in mm."),
    Column("trigger_time", Double, comment="TriggerTime (0018,1060) in ms."),
    Column("phase", Integer, comment="Rank of the trigger time among the images of the series at the same position, from 0."),
    Column("slope", Double, nullable=False, server_default="1", comment="RescaleSlope (0028,1053); 1 when missing."),
    Column("intercept", Double, nullable=False, server_default="0", comment="RescaleIntercept (0028,1052); 0 when missing."),
    Column(
        "modality_lut",
        Boolean,
        nullable=False,
        server_default="false",
        comment="Its values go through a Modality LUT Sequence (0028,3000).",
    ),
    Column("pixel_hash", LargeBinary, comment="sha256 of the stored values, C order, little endian; NULL until it is measured."),
    Column("sample_key", Uuid, nullable=False, unique=True, comment="What the sample is, on any server: sample_key(UID, frame)."),
    UniqueConstraint("instance_id", "frame"),
    Index("ix_image_pixel_hash", "pixel_hash", postgresql_using="hash"),
    # Images whose phase an ingest still has to work out: empty in the steady state, so looking for them costs nothing.
    Index("ix_image_no_phase", "instance_id", postgresql_where=text("phase IS NULL AND trigger_time IS NOT NULL AND position IS NOT NULL")),
    CheckConstraint("frame >= 0 AND rows > 0 AND columns > 0 AND samples_per_pixel > 0", name="size"),
    CheckConstraint("cardinality(image_position) = 3 AND cardinality(image_orientation) = 6", name="geometry"),
    CheckConstraint("pixel_hash IS NULL OR length(pixel_hash) = 32", name="pixel_hash"),
    comment="One 2-D frame of an instance: what a sample is.",
)

location = Table(
    "location",
    metadata,
    Column("image_id", BigInteger, ForeignKey("image.id", ondelete="CASCADE"), primary_key=True, comment="Whose pixels."),
    Column("file_id", BigInteger, ForeignKey("file.id"), primary_key=True, index=True, comment="The file they lie in."),
    Column("byte_offset", BigInteger, comment="Where the frame begins in the file; NULL when it must be decoded."),
    Column("byte_length", BigInteger, comment="Bytes of the frame; NULL when it must be decoded."),
    Column("dtype", Text, comment="Stored type and byte order as numpy writes it (<i2); NULL when pydicom must decode."),
    Column("transfer_syntax_uid", Text, nullable=False, comment="TransferSyntaxUID (0002,0010)."),
    Column(
        "bits_stored",
        SmallInteger,
        comment="BitsStored (0028,0101) where nobody looked whether bits above it are in use: a read by offset clears them; else NULL.",
    ),
    Column("coding", Text, nullable=False, server_default="", comment="gzip: the offset counts in what the file decompresses to."),
    Column("preferred", Boolean, nullable=False, comment="Read from here: a present file, by offset where there is one."),
    Index("ix_location_preferred", "image_id", unique=True, postgresql_where=text("preferred")),
    CheckConstraint("num_nonnulls(byte_offset, byte_length, dtype) IN (0, 3)", name="by_offset_whole"),
    comment="Where an image's pixels lie. One image may have several (re-encodings); one at most is preferred.",
)

measure = Table(
    "measure",
    metadata,
    Column("image_id", BigInteger, ForeignKey("image.id", ondelete="CASCADE"), primary_key=True, comment="Whose pixels."),
    Column("minimum", Double, nullable=False, comment="Smallest value after the modality transform; NaN are left out."),
    Column("maximum", Double, nullable=False, comment="Largest."),
    Column("mean", Double, nullable=False, comment="Mean."),
    Column("deviation", Double, nullable=False, comment="Standard deviation."),
    Column("entropy", Double, nullable=False, comment="Shannon entropy of its histogram of 256 equal bins from minimum to maximum, bits."),
    Column("saturated", Double, nullable=False, comment="Share of pixels at the largest value."),
    Column("nans", BigInteger, nullable=False, comment="Pixels that are no finite number."),
    Column("near_hash", BigInteger, comment="64 bits that images which look alike share, all but a few; see catalog/nearness.py."),
    _now("measured_at", "When it was measured."),
    comment="What `catalog measure` found in an image's pixels.",
)

# ------------------------------------------------------------------------------------------ what readers drew

reader = Table(
    "reader",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="Who drew: a person, a group, a program."),
    Column("preference", Integer, nullable=False, server_default="0", comment="Of several readers of one image the smallest is fed."),
    comment="Who draws annotations.",
)

structure = Table(
    "structure",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="What was drawn: inner, outer, a ROI or segment name."),
    CheckConstraint("name <> ''", name="not_empty"),
    comment="What can be drawn.",
)

annotation = Table(
    "annotation",
    metadata,
    _id(),
    _ref("file_id", "file", "The file it was read from.", index=False),
    Column("source_key", Text, nullable=False, server_default="", comment="Which annotation in the file; empty when it holds one."),
    Column("version", Integer, nullable=False, server_default="1", comment="From 1; a changed file is a new version, the old one stays."),
    Column("current", Boolean, nullable=False, server_default="true", comment="The newest version of what is still in its file."),
    _ref("reader_id", "reader", "Who drew it.", index=False),
    _ref("structure_id", "structure", "What was drawn."),
    Column("kind", Text, nullable=False, comment="polygon, segment or label."),
    Column("origin", Text, nullable=False, comment="contour, segment, label (as drawn), interpolated or proposed (derived)."),
    Column("label", Text, comment="The class, for kind label."),
    Column("points", ARRAY(Double), comment="Polygon as read, never shifted: x, y, … in px (patient: x, y, z, … in mm), ring after ring."),
    Column("rings", ARRAY(Integer), comment="Points in each ring; several rings are one mask by even-odd."),
    Column("convention", Text, comment="corner: the centre of the first pixel is (0.5, 0.5); centre: it is (0, 0); patient: mm."),
    Column("shift_x", Double, nullable=False, server_default="0", comment="px added to x before the mask is made."),
    Column("shift_y", Double, nullable=False, server_default="0", comment="px added to y before the mask is made."),
    Column("polygon_area_px", Double, comment="Area of the polygon by the shoelace formula, px²."),
    Column("rows", Integer, comment="Height of a segment's grid in px."),
    Column("columns", Integer, comment="Width of a segment's grid in px."),
    Column("box", ARRAY(Integer), comment="What a segment's bits cover: first row, first column, rows, columns."),
    Column("bits", LargeBinary, comment="A segment as read: numpy.packbits of its bounding box, C order."),
    Column("content_hash", LargeBinary, nullable=False, comment="sha256 of what was drawn; equal content is no new version."),
    Column("refers_to", JSONB, nullable=False, server_default="{}", comment="What the source says about its image, as found."),
    _ref("ingest_run_id", "ingest_run", "The run that brought this version.", index=False),
    _now("created_at", "When it came in."),
    UniqueConstraint("file_id", "source_key", "version"),
    Index("ix_annotation_current", "file_id", "source_key", unique=True, postgresql_where=text("current")),
    # Which images show a 7?
    Index("ix_annotation_label", "label", "structure_id", postgresql_where=text("current AND kind = 'label'")),
    CheckConstraint("kind IN ('polygon', 'segment', 'label')", name="kind"),
    CheckConstraint("origin IN ('contour', 'segment', 'label', 'interpolated', 'proposed')", name="origin"),
    CheckConstraint("kind <> 'polygon' OR num_nonnulls(points, rings, convention) = 3", name="polygon_whole"),
    CheckConstraint("convention IN ('corner', 'centre', 'patient')", name="convention"),
    CheckConstraint("num_nonnulls(rows, columns, box, bits) = CASE WHEN kind = 'segment' THEN 4 ELSE 0 END", name="segment_whole"),
    CheckConstraint("(kind = 'label') = (label IS NOT NULL)", name="label"),
    CheckConstraint("version >= 1", name="version"),
    comment="One thing a reader drew. Immutable: a correction is a new version.",
)

pairing = Table(
    "pairing",
    metadata,
    _id(),
    _ref("annotation_id", "annotation", "What was drawn.", index=False),
    _ref("image_id", "image", "On which image."),
    Column("method", Text, nullable=False, comment="How it was found: file-number, instance-number, …"),
    Column("rule", Text, nullable=False, comment="The rule in words, with what it matched."),
    Column("score", Double, nullable=False, comment="How sure, 0 to 1."),
    Column("state", Text, nullable=False, comment="proposed, accepted or rejected."),
    Column("actor", Text, nullable=False, comment="Who decided: layout:NAME, or a person."),
    _now("at", "When the state was decided."),
    UniqueConstraint("annotation_id", "image_id"),
    # What was drawn once was drawn on one image.
    Index("ix_pairing_accepted", "annotation_id", unique=True, postgresql_where=text("state = 'accepted'")),
    CheckConstraint("state IN ('proposed', 'accepted', 'rejected')", name="state"),
    CheckConstraint("score BETWEEN 0 AND 1", name="score"),
    comment="Which annotation belongs to which image, and why.",
)

mask = Table(
    "mask",
    metadata,
    Column("pairing_id", BigInteger, ForeignKey("pairing.id", ondelete="CASCADE"), primary_key=True, comment="Annotation and image."),
    Column("rows", Integer, nullable=False, comment="Height of the image's grid in px."),
    Column("columns", Integer, nullable=False, comment="Width of the image's grid in px."),
    Column("box_row", Integer, nullable=False, server_default="0", comment="First row that bits cover."),
    Column("box_column", Integer, nullable=False, server_default="0", comment="First column that bits cover."),
    Column("box_rows", Integer, nullable=False, comment="Rows that bits cover: the mask's bounding box; 0 if it is empty."),
    Column("box_columns", Integer, nullable=False, comment="Columns that bits cover."),
    Column("bits", LargeBinary, nullable=False, comment="numpy.packbits of the box in C order, first pixel in the highest bit."),
    Column("area_px", BigInteger, Computed("bit_count(bits)", persisted=True), nullable=False, comment="Pixels in the mask."),
    CheckConstraint("length(bits) = (box_rows::bigint * box_columns + 7) / 8", name="bits_fill_box"),
    CheckConstraint(
        "box_row >= 0 AND box_column >= 0 AND box_row + box_rows <= rows AND box_column + box_columns <= columns", name="box_inside"
    ),
    comment="The raster of an annotation on its image.",
)

shape = Table(
    "shape",
    metadata,
    Column("pairing_id", BigInteger, ForeignKey("pairing.id", ondelete="CASCADE"), primary_key=True, comment="Annotation and image."),
    Column("points", Integer, comment="Points of the polygon, all rings; NULL for a segment."),
    Column("smallest_ring", Integer, comment="Distinct points of its ring that has fewest."),
    Column("points_outside", Integer, comment="Points outside the image's pixels, to their outer edges."),
    Column("self_crossings", Integer, comment="Proper crossings of edges, of one ring with itself or another; 100 stands for more too."),
    Column("gap_px", Double, comment="From a ring's last point to its first, the widest of its rings."),
    Column("step_px", Double, comment="Median distance of neighbouring points."),
    Column("perimeter_px", Double, comment="Length of the closed polygon, or of the mask's outline along pixel edges."),
    Column("polygon_area_px", Double, comment="Area of the polygon in px by even-odd, on this image; NULL for a segment."),
    Column("polygon_hash", LargeBinary, comment="sha256 of the polygon, wherever its points begin and whichever way they run."),
    Column("components", Integer, nullable=False, comment="Parts of the mask that touch by no edge (4-connected)."),
    Column("largest_px", BigInteger, nullable=False, comment="Pixels of its largest part."),
    Column("holes", Integer, nullable=False, comment="Parts of the background that the mask encloses (8-connected)."),
    Column("border_px", Integer, nullable=False, comment="Pixels of the mask in the first or last row or column of the image."),
    Column("centroid_row", Double, comment="Mean row of the mask's pixels, px; NULL if it is empty."),
    Column("centroid_column", Double, comment="Mean column."),
    Column("centroid", ARRAY(Double), comment="The same in mm of the patient: x, y, z; NULL where the image does not say where it lies."),
    CheckConstraint("cardinality(centroid) = 3", name="centroid"),
    comment="What a mask and its polygon are like on their image: computed once, for rules.",
)

overlap = Table(
    "overlap",
    metadata,
    Column("pairing_id", BigInteger, ForeignKey("pairing.id", ondelete="CASCADE"), primary_key=True, comment="The one mask."),
    Column(
        "other_id",
        BigInteger,
        ForeignKey("pairing.id", ondelete="CASCADE"),
        primary_key=True,
        index=True,
        comment="The other: the one around it, the next slice, the next phase.",
    ),
    Column("kind", Text, nullable=False, comment="image: on one image; slice, phase: the same structure and reader on the next one."),
    Column("apart", Double, nullable=False, comment="mm along the slice normal from one to the other, or ms of trigger time; image: 0."),
    Column("pixels", BigInteger, nullable=False, comment="Pixels in both, where they lie one behind the other."),
    CheckConstraint("kind IN ('image', 'slice', 'phase')", name="kind"),
    comment="Masks that rules compare, and what they have in common: see catalog/overlaps.py.",
)

edge_fit = Table(
    "edge_fit",
    metadata,
    Column("pairing_id", BigInteger, ForeignKey("pairing.id", ondelete="CASCADE"), primary_key=True, comment="Annotation and image."),
    Column("scores", ARRAY(REAL), nullable=False, comment="Mean gradient along the polygon at 9 × 9 shifts of -2…2 px, y by y; of mean 0."),
    CheckConstraint("cardinality(scores) = 81", name="scores"),
    comment="How well a polygon follows its image's edges, as drawn and moved: `catalog measure` computes it.",
)

relation = Table(
    "relation",
    metadata,
    Column("inside", Text, primary_key=True, comment="Name of the structure that lies inside."),
    Column("outside", Text, primary_key=True, comment="Name of the one around it."),
    Column("actor", Text, nullable=False, comment="Who said so."),
    _now("at", "When."),
    CheckConstraint("inside <> outside", name="two"),
    comment="Which structure lies inside which, for rules.",
)

# ------------------------------------------------------------------------------------------ quality

SUBJECTS = ("file_id", "image_id", "annotation_id", "pairing_id", "series_id", "study_id", "patient_id")

flag = Table(
    "flag",
    metadata,
    _id(),
    Column("rule", Text, nullable=False, index=True, comment="Code of the rule that raised it."),
    Column("rule_version", Integer, nullable=False, server_default="1", comment="Version of that rule."),
    Column("severity", Text, nullable=False, comment="error, warning or info. Open errors keep a sample out of feeding."),
    Column("state", Text, nullable=False, server_default="open", comment="open, resolved or false_positive."),
    Column("detail", Text, nullable=False, comment="What was found, in words."),
    Column("value", Double, comment="What was measured, where a number says it."),
    _ref("file_id", "file", "Subject: a file.", nullable=True, index=False),
    _ref("image_id", "image", "Subject: an image.", nullable=True, index=False),
    _ref("annotation_id", "annotation", "Subject: an annotation.", nullable=True, index=False),
    _ref("pairing_id", "pairing", "Subject: a pairing.", nullable=True, index=False),
    _ref("series_id", "series", "Subject: a series.", nullable=True, index=False),
    _ref("study_id", "study", "Subject: a study.", nullable=True, index=False),
    _ref("patient_id", "patient", "Subject: a patient.", nullable=True, index=False),
    Column("raised_by", Text, nullable=False, comment="ingest, loaderd, or a person."),
    _now("raised_at", "When it was raised."),
    Column("closed_by", Text, comment="Who closed it."),
    Column("closed_at", DateTime(timezone=True), comment="When it was closed."),
    Column("reason", Text, comment="Why it was closed."),
    Column("assigned_to", Text, comment="Who looks after it."),
    Column(
        "revokes",
        Boolean,
        nullable=False,
        server_default="false",
        comment="While it is open nothing of its subject is fed: at once, from frozen streams too, and what is ingested later as well.",
    ),
    CheckConstraint("severity IN ('error', 'warning', 'info')", name="severity"),
    CheckConstraint("state IN ('open', 'resolved', 'false_positive')", name="state"),
    CheckConstraint(f"num_nonnulls({', '.join(SUBJECTS)}) = 1", name="one_subject"),
    CheckConstraint("(state = 'open') = (closed_at IS NULL)", name="closed"),
    # Raising the same finding twice leaves one open flag.
    Index("ix_flag_open", "rule", *SUBJECTS, unique=True, postgresql_where=text("state = 'open'"), postgresql_nulls_not_distinct=True),
    # Deleting a row asks each of these whether a flag is left on it: taking 20,000 images out took 16 s without, and 2 s with them.
    *(Index(f"ix_flag_{subject}", subject, postgresql_where=text(f"{subject} IS NOT NULL")) for subject in SUBJECTS),
    Index("ix_flag_revokes", "id", postgresql_where=text("revokes AND state = 'open'")),
    CheckConstraint("NOT revokes OR severity = 'error'", name="revokes_error"),
    comment="A finding on a file, image, annotation, pairing, series, study or patient.",
)

rule_setting = Table(
    "rule_setting",
    metadata,
    Column("rule", Text, primary_key=True, comment="Code of a rule."),
    Column("name", Text, primary_key=True, comment="One of its parameters, or enabled."),
    Column("value", Text, nullable=False, comment="What it is here instead of the rule's default."),
    Column("actor", Text, nullable=False, comment="Who set it."),
    _now("at", "When."),
    Column("reason", Text, nullable=False, comment="Why."),
    comment="Parameters of rules that are not at their defaults.",
)

qa_run = Table(
    "qa_run",
    metadata,
    _id(),
    _now("started_at", "When it began."),
    Column("finished_at", DateTime(timezone=True), comment="When it ended; NULL while it runs, and if it was cut short."),
    Column("changed_only", Boolean, nullable=False, comment="Were only patients looked at of whom something had changed?"),
    Column(
        "complete",
        Boolean,
        nullable=False,
        server_default="false",
        comment="Did it end, and were all of our rules in it? From the last such one on, touched says what changed.",
    ),
    Column("actor", Text, nullable=False, comment="Who ran it."),
    Column("program_version", Text, nullable=False, comment="Version of scanfeed."),
    comment="One `catalog qa run`.",
)

qa_result = Table(
    "qa_result",
    metadata,
    Column("qa_run_id", BigInteger, ForeignKey("qa_run.id", ondelete="CASCADE"), primary_key=True, comment="Of which run."),
    Column("rule", Text, primary_key=True, comment="Code of the rule."),
    Column("rule_version", Integer, nullable=False, comment="Its version."),
    Column("findings", BigInteger, nullable=False, comment="Subjects that fail it."),
    Column("raised", BigInteger, nullable=False, comment="Flags that it raised."),
    Column("closed", BigInteger, nullable=False, comment="Flags that closed themselves, as what they spoke of is no longer so."),
    Column("not_evaluated", BigInteger, nullable=False, comment="Subjects that it could not look at."),
    Column("why", Text, nullable=False, server_default="", comment="Why not."),
    Column("seconds", Double, nullable=False, comment="How long it took."),
    Column(
        "digest",
        LargeBinary,
        nullable=False,
        comment="sha256 of the rule as it was: query, parameters, relations. Another one: --changed is not enough for it.",
    ),
    comment="What a rule found in a run.",
)

scope = Table(
    "scope",
    metadata,
    Column("series_id", BigInteger, primary_key=True, comment="A series to look at."),
    Column("study_id", BigInteger, nullable=False, index=True, comment="Its study."),
    Column("patient_id", BigInteger, nullable=False, index=True, comment="Its patient, all of whose series are here."),
    comment="What the `catalog qa run` that is running looks at; rules join it.",
    prefixes=["UNLOGGED"],
)

touched = Table(
    "touched",
    metadata,
    _id(),
    Column("series_id", BigInteger, nullable=False, comment="In which something changed that a rule may look at."),
    comment="What `catalog qa run --changed` has to look at; triggers write it.",
)

event = Table(
    "event",
    metadata,
    _id(),
    _now("at", "When."),
    Column("actor", Text, nullable=False, comment="Who: a person, ingest, qa, loaderd, layout:NAME."),
    Column(
        "subject",
        Text,
        nullable=False,
        comment="The table of what changed: flag, pairing, annotation, rule_setting, relation, split_patient.",
    ),
    Column("subject_id", BigInteger, comment="Its id there."),
    Column("action", Text, nullable=False, comment="insert, update or delete."),
    Column("before", JSONB, comment="What changed, as it was."),
    Column("after", JSONB, comment="What changed, as it is."),
    Column("reason", Text, comment="Why, in words."),
    Column("login", Text, nullable=False, server_default=text("SESSION_USER"), comment="Login of the database under which it was done."),
    Index("ix_event_subject", "subject", "subject_id"),
    comment="Who decided what, when and why. Rows are never changed or deleted: the database refuses.",
)

# ------------------------------------------------------------------------------------------ labels that are derived

derivation = Table(
    "derivation",
    metadata,
    Column(
        "annotation_id",
        BigInteger,
        ForeignKey("annotation.id", ondelete="CASCADE"),
        primary_key=True,
        comment="What was derived: a segment of origin interpolated or proposed, in the file of its first parent.",
    ),
    Column("method", Text, nullable=False, comment="How: shape, linear, nearest (interpolated); otsu, kmeans, edges (proposed)."),
    Column("along", Text, comment="slices: its parents lie on both sides in space; phases: before and after in time. NULL: proposed."),
    _ref("first_id", "annotation", "The annotation that it was made from; of two the one of smaller position or time.", cascade=True),
    _ref("second_id", "annotation", "The other one; NULL: proposed.", nullable=True, cascade=True),
    Column("fraction", Double, comment="Where it lies between its parents: 0 is the first, 1 the second."),
    Column("gap", Double, comment="From the first to the second: mm along the slice normal, or ms of trigger time."),
    Column("parameters", JSONB, nullable=False, server_default="{}", comment="What else the method was told, or found."),
    Column("program_version", Text, nullable=False, comment="Version of scanfeed."),
    Column("actor", Text, nullable=False, comment="Who asked for it."),
    _now("at", "When."),
    CheckConstraint("along IN ('slices', 'phases')", name="along"),
    CheckConstraint("num_nonnulls(along, second_id, fraction, gap) IN (0, 4)", name="between"),
    CheckConstraint("fraction > 0 AND fraction < 1 AND gap > 0", name="inside"),
    comment="Where a label came from that nobody drew. When a parent is rejected or replaced, so is what was made from it.",
)

# ------------------------------------------------------------------------------------------ splits and snapshots

split = Table(
    "split",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="Its name."),
    Column("parts", ARRAY(Text), nullable=False, comment="Its parts: train, val, test."),
    Column("ratios", ARRAY(Double), comment="Share of the patients that each part is to have; sum 1. NULL: imported."),
    Column("folds", Integer, comment="Folds over all parts but test; NULL: none."),
    Column("stratify", Text, comment="Expression over view sample whose most frequent value is a patient's stratum."),
    Column("seed", BigInteger, comment="Decides who comes where. NULL: imported."),
    Column("actor", Text, nullable=False, comment="Who made it."),
    _now("created_at", "When."),
    Column("frozen_by", Text, comment="Who froze it."),
    Column("frozen_at", DateTime(timezone=True), comment="When: from then on nobody comes to it, moves or goes, but who is erased."),
    CheckConstraint("name <> '' AND name !~ '[/:]'", name="name"),
    CheckConstraint("cardinality(parts) >= 1 AND cardinality(ratios) = cardinality(parts)", name="parts"),
    CheckConstraint("folds >= 2", name="folds"),
    CheckConstraint("num_nonnulls(frozen_by, frozen_at) IN (0, 2)", name="frozen"),
    comment="Who is trained on and who is held out: a part for each patient.",
)

split_patient = Table(
    "split_patient",
    metadata,
    # The key is what makes a patient on two sides impossible.
    Column("split_id", BigInteger, ForeignKey("split.id", ondelete="CASCADE"), primary_key=True, comment="The split."),
    Column("patient_id", BigInteger, ForeignKey("patient.id", ondelete="CASCADE"), primary_key=True, index=True, comment="The patient."),
    Column("part", Text, nullable=False, comment="Its part."),
    Column("fold", Integer, comment="Its fold, from 0; NULL: the split has none, or the part is test."),
    Column("stratum", Text, comment="What it was stratified by, when it came in."),
    _now("at", "When it came in."),
    CheckConstraint("part <> '' AND part !~ '[/:]'", name="part"),
    CheckConstraint("fold >= 0", name="fold"),
    comment="In which part of a split a patient is. Patients that share pixels are in the same: the database refuses anything else.",
)

snapshot = Table(
    "snapshot",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="Its name."),
    Column("sha256", LargeBinary, nullable=False, comment="Digest of what its samples are, whatever their ids, paths and order."),
    Column("structures", ARRAY(Text), nullable=False, comment="Structures (and labels) of which it has annotations, by name."),
    Column("definition", JSONB, nullable=False, comment="How its samples were chosen: where, split, origins, …"),
    Column("num_samples", BigInteger, nullable=False, comment="How many samples it has, erased ones too."),
    Column("num_patients", BigInteger, nullable=False, comment="Of how many patients, when it was made."),
    Column("program_version", Text, nullable=False, comment="Version of scanfeed."),
    Column("actor", Text, nullable=False, comment="Who made it."),
    _now("created_at", "When."),
    CheckConstraint("name <> '' AND length(sha256) = 32 AND num_samples > 0", name="whole"),
    comment="A frozen list of samples. Never changed or deleted: the database refuses.",
)

snapshot_sample = Table(
    "snapshot_sample",
    metadata,
    Column("snapshot_id", BigInteger, ForeignKey("snapshot.id"), primary_key=True, comment="The snapshot."),
    Column("number", BigInteger, primary_key=True, comment="From 0, by sample key as it was then."),
    # No cascade: an image in a snapshot is not deleted, but by an erasure, which takes it out of here first.
    Column("image_id", BigInteger, ForeignKey("image.id"), comment="The image; NULL: its patient was erased."),
    Column("sample_key", Uuid, comment="The image's sample key when the snapshot was made; NULL: erased."),
    Column("part", Text, comment="Its patient's part in the split; NULL: the snapshot has none."),
    Column("fold", Integer, comment="And its fold."),
    Column(
        "sha256", LargeBinary, nullable=False, comment="Digest of the sample: pixels, masks, structures, part. Stays when it is erased."
    ),
    _ref("erasure_id", "erasure", "The erasure that took it out.", nullable=True, index=False),
    Index("ix_snapshot_sample_image_id", "image_id", "snapshot_id", unique=True, postgresql_where=text("image_id IS NOT NULL")),
    CheckConstraint("length(sha256) = 32 AND number >= 0", name="whole"),
    CheckConstraint("num_nonnulls(image_id, sample_key) = CASE WHEN erasure_id IS NULL THEN 2 ELSE 0 END", name="erased"),
    comment="A sample of a snapshot.",
)

snapshot_mask = Table(
    "snapshot_mask",
    metadata,
    Column("snapshot_id", BigInteger, ForeignKey("snapshot.id"), primary_key=True, comment="The snapshot."),
    Column("number", BigInteger, primary_key=True, comment="Which of its samples."),
    Column("structure", Text, primary_key=True, comment="Structure or label."),
    _ref("pairing_id", "pairing", "Annotation, image and mask."),
    Column("sha256", LargeBinary, nullable=False, comment="Digest of the mask or label, its structure and origin."),
    ForeignKeyConstraint(["snapshot_id", "number"], ["snapshot_sample.snapshot_id", "snapshot_sample.number"]),
    CheckConstraint("length(sha256) = 32", name="whole"),
    comment="What was drawn on a sample of a snapshot.",
)

# ------------------------------------------------------------------------------------------ feeding

stream = Table(
    "stream",
    metadata,
    _id(),
    Column("name", Text, comment="NULL for a stream defined by a Feed's arguments alone."),
    Column("definition", JSONB, nullable=False, comment="What is fed: selection, structures, seed, batch size, …"),
    Column("digest", LargeBinary, nullable=False, comment="sha256 of the definition as canonical JSON."),
    _now("created_at", "When it was first asked for."),
    Column("ended_at", DateTime(timezone=True), comment="When it was ended: nobody attaches any more, and its name is free again."),
    Column(
        "constants",
        JSONB,
        comment="Looked up when it was first asked for, and kept: classes of labels, statistics of images. NULL: nothing was needed.",
    ),
    Index("ix_stream_unnamed", "digest", unique=True, postgresql_where=text("name IS NULL")),
    Index("ix_stream_name", "name", unique=True, postgresql_where=text("ended_at IS NULL")),
    CheckConstraint("name <> ''", name="name"),
    comment="A definition of what is fed.",
)

run = Table(
    "run",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True, comment="The training's name; made up when none was given."),
    Column("program_version", Text, nullable=False, comment="Version of scanfeed."),
    Column("host", Text, nullable=False, comment="Machine of the daemon that opened it."),
    _now("created_at", "When it was opened."),
    comment="One training.",
)

run_note = Table(
    "run_note",
    metadata,
    _id(),
    _ref("run_id", "run", "The training."),
    _now("at", "When it was noted."),
    Column("actor", Text, nullable=False, comment="Who noted it."),
    Column("note", Text, nullable=False, server_default="", comment="In words."),
    Column("model_sha256", LargeBinary, comment="sha256 of a model that this training made."),
    CheckConstraint("length(model_sha256) = 32", name="model_sha256"),
    CheckConstraint("note <> '' OR model_sha256 IS NOT NULL", name="says_something"),
    comment="What became of a training: the models it made, and remarks.",
)

attempt = Table(
    "attempt",
    metadata,
    _id(),
    _ref("run_id", "run", "The training.", index=False),
    _ref("stream_id", "stream", "What is fed."),
    Column("attempt", Integer, nullable=False, comment="Uninterrupted stretch of the run on this stream, from 1."),
    Column("num_ranks", Integer, nullable=False, comment="Training processes that share its batches."),
    Column("epoch", Integer, nullable=False, comment="Epoch in which it begins."),
    Column("step", Integer, nullable=False, comment="Its first step in that epoch; steps before it were made by earlier attempts."),
    Column("position", BigInteger, nullable=False, comment="Position in that epoch at which its first step begins."),
    Column("versions", JSONB, nullable=False, server_default="{}", comment="What the daemon that opened it ran on: package → version."),
    _now("opened_at", "When it was opened."),
    UniqueConstraint("run_id", "stream_id", "attempt"),
    CheckConstraint("attempt >= 1 AND num_ranks >= 1 AND epoch >= 0 AND step >= 0 AND position >= 0", name="counted"),
    comment="One uninterrupted stretch of a run. A later one that begins earlier replaces what came after its beginning.",
)

consumer = Table(
    "consumer",
    metadata,
    _id(),
    _ref("run_id", "run", "The training; NULL until it asks for its first epoch.", index=False, nullable=True),
    _ref("stream_id", "stream", "What it is fed."),
    Column("attempt", Integer, comment="Attempt of the run; NULL until it asks for its first epoch."),
    Column("rank", Integer, nullable=False, comment="Its place among num_ranks, from 0."),
    Column("num_ranks", Integer, nullable=False, comment="Training processes that share the batches."),
    Column("host", Text, nullable=False, comment="Machine of the training process and its daemon."),
    Column("pid", Integer, nullable=False, comment="Process, as the kernel says."),
    Column("uid", Integer, nullable=False, comment="User, as the kernel says."),
    Column("daemon_pid", Integer, nullable=False, comment="Process of the daemon."),
    Column("versions", JSONB, nullable=False, server_default="{}", comment="What the training process runs on: package → version."),
    _now("attached_at", "When it attached."),
    Column("left_at", DateTime(timezone=True), comment="When it left or was seen to be gone; NULL: it is fed, or its daemon died."),
    Column("reason", Text, comment="Why it left; NULL: it said goodbye or was closed."),
    Column("reserved_epoch", Integer, comment="Epoch of its last reservation."),
    Column("reserved_to", BigInteger, comment="All its positions of that epoch before this one have a row in the ledger."),
    Column("ended_epoch", Integer, comment="Last epoch of which it got everything."),
    Index("ix_consumer_attempt", "run_id", "stream_id", "attempt", "rank"),
    CheckConstraint("rank >= 0 AND rank < num_ranks", name="rank"),
    CheckConstraint("(run_id IS NULL) = (attempt IS NULL)", name="attempt_whole"),
    CheckConstraint("(reserved_epoch IS NULL) = (reserved_to IS NULL)", name="reserved_whole"),
    comment="Who attached to a daemon: one row an attach. While it is fed, its daemon holds an advisory lock on its id.",
)

epoch = Table(
    "epoch",
    metadata,
    _id(),
    _ref("run_id", "run", "The training.", index=False),
    _ref("stream_id", "stream", "What is fed."),
    Column("epoch", Integer, nullable=False, comment="Pass over the stream, from 0."),
    Column("num_samples", BigInteger, nullable=False, comment="Positions planned."),
    Column("catalog_changes", BigInteger, nullable=False, comment="Rows of catalog_change seen by the transaction that planned it."),
    Column("order_sha256", LargeBinary, comment="sha256 of the sample keys in order; NULL until the whole order is stored."),
    _now("planned_at", "When the order was taken."),
    Column("started_at", DateTime(timezone=True), comment="When its first batch was asked for; NULL: prepared ahead, provisional."),
    Column("pruned_at", DateTime(timezone=True), comment="When its order and ledger rows were dropped; summary and patients stay."),
    Column("summary", JSONB, comment="Its row of epoch_coverage when it was pruned."),
    Column("patients", ARRAY(BigInteger), comment="patient.id of everybody of whom it delivered something, when it was pruned."),
    UniqueConstraint("run_id", "stream_id", "epoch"),
    CheckConstraint("epoch >= 0 AND num_samples >= 0", name="counted"),
    CheckConstraint("num_nonnulls(pruned_at, summary, patients) IN (0, 3)", name="pruned_whole"),
    comment="One pass over a stream; its order lies in epoch_order.",
)

epoch_order = Table(
    "epoch_order",
    metadata,
    Column("epoch_id", BigInteger, ForeignKey("epoch.id", ondelete="CASCADE"), primary_key=True, comment="Whose order."),
    Column("part", Integer, primary_key=True, comment="Positions 1024 * part and following."),
    Column("sample_ids", ARRAY(BigInteger), nullable=False, comment="image.id at each position."),
    Column(
        "annotation_ids",
        ARRAY(BigInteger),
        nullable=False,
        comment="Of the stream's first structure one a position, then of the next; 0: none.",
    ),
    CheckConstraint("cardinality(sample_ids) BETWEEN 1 AND 1024", name="part"),
    comment="The random permutation of an epoch, as the database made it: 1,024 positions a row.",
)

ledger = Table(
    "ledger",
    metadata,
    _id(),
    _ref("epoch_id", "epoch", "Run, stream and epoch.", index=False),
    Column("attempt", Integer, nullable=False, server_default="1", comment="Uninterrupted stretch of the run, from 1."),
    Column("outcome", Text, nullable=False, comment="delivered (durable before it is announced), dropped, unreadable or revoked."),
    Column("positions", INT8MULTIRANGE, nullable=False, comment="Positions of the epoch's order with that outcome."),
    Column("acknowledged", INT8MULTIRANGE, nullable=False, server_default=text("'{}'"), comment="Of these, what the trainer went on from."),
    Column("consumer", Text, nullable=False, comment="host:pid of the training process."),
    Column("rank", Integer, nullable=False, server_default="0", comment="Its place among the ranks of the attempt."),
    _now("at", "When it became durable."),
    # Not unique: epoch_coverage is to show a row that came twice, not to be kept from seeing it.
    Index("ix_ledger_epoch_id", "epoch_id", "attempt", "rank"),
    CheckConstraint("outcome IN ('delivered', 'dropped', 'unreadable', 'revoked')", name="outcome"),
    CheckConstraint("attempt >= 1", name="attempt"),
    CheckConstraint("NOT isempty(positions) AND acknowledged <@ positions", name="positions"),
    comment="What was delivered to whom.",
)

# ------------------------------------------------------------------------------------------ bookkeeping

catalog_change = Table(
    "catalog_change",
    metadata,
    Column("xid", BigInteger, primary_key=True, comment="Transaction that changed what can be fed."),
    Column("at", DateTime(timezone=True), primary_key=True, comment="When it began."),
    comment="One row a transaction that touched the catalog, written by triggers; their count tells a daemon to plan again.",
)

erasure = Table(
    "erasure",
    metadata,
    _id(),
    _now("at", "When."),
    Column("actor", Text, nullable=False, comment="Who erased the patient."),
    Column("reason", Text, nullable=False, comment="Why, in words."),
    Column("salt", LargeBinary, nullable=False, comment="Random bytes before what is hashed."),
    Column("patient_sha256", LargeBinary, nullable=False, comment="sha256 of salt and PatientID: an ingest refuses files of the patient."),
    Column("file_sha256s", ARRAY(LargeBinary), nullable=False, comment="sha256 of salt, root.id, / and path of each annotation file."),
    Column("annotations", BigInteger, nullable=False, comment="Annotations that went, all versions."),
    Column("image_ids", ARRAY(BigInteger), nullable=False, comment="image.id of what went: orders of epochs name them still."),
    CheckConstraint("length(patient_sha256) = 32 AND length(salt) >= 16", name="hashed"),
    comment="A patient whose rows were deleted. Nothing here says who it was.",
)

pseudonymization = Table(
    "pseudonymization",
    metadata,
    Column("only", Boolean, primary_key=True, server_default="true", comment="There is one row, or none."),
    Column("key_check", LargeBinary, nullable=False, comment="HMAC of a constant under the key: another key is noticed by it."),
    Column("dates", Text, nullable=False, comment="shift: a patient's dates are moved by some days; drop: they are not kept."),
    Column("actor", Text, nullable=False, comment="Who asked for it."),
    _now("at", "When."),
    CheckConstraint('"only"', name="only"),
    CheckConstraint("dates IN ('shift', 'drop')", name="dates"),
    comment="A row: this catalog holds keyed hashes of patients, UIDs and paths. The key is not here.",
)

sql_login = Table(
    "sql_login",
    metadata,
    Column("role", Text, primary_key=True, comment="Login without write rights under which SQL given by users runs."),
    Column("password", Text, nullable=False, comment="Its password; only the owner of the catalog can read this table."),
    comment="The login for SQL that users give.",
)
