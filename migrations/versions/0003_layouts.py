"""Any layout and any file: formats, objects without images, segments and labels, hashes of files, measures of pixels."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


# A JSON array of numbers; NULL for anything else.
NUMBERS = """
CREATE FUNCTION numbers(value jsonb) RETURNS float8[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN jsonb_typeof(value) = 'array' THEN ARRAY(SELECT jsonb_array_elements_text(value)::float8) END
$$
"""

# mm from a point to the plane of an image (PS3.3 C.7.6.2.1.1); NULL where the image does not say where it lies.
PLANE_DISTANCE = """
CREATE FUNCTION plane_distance(point float8[], origin float8[], axes float8[]) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT ((point[1] - origin[1]) * x + (point[2] - origin[2]) * y + (point[3] - origin[3]) * z) / nullif(sqrt(x * x + y * y + z * z), 0)
    FROM (SELECT axes[2] * axes[6] - axes[3] * axes[5] AS x, axes[3] * axes[4] - axes[1] * axes[6] AS y,
                 axes[1] * axes[5] - axes[2] * axes[4] AS z) AS normal
$$
"""

# Do two images begin at one point (to 0.5 mm) with the same directions (to 0.001, which is 0.25 mm over 256 mm)?
SAME_GRID = """
CREATE FUNCTION same_grid(a float8[], a_axes float8[], b float8[], b_axes float8[]) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (SELECT bool_and(abs(x - y) <= 0.5) FROM unnest(a, b) AS p (x, y))
       AND (SELECT bool_and(abs(x - y) <= 0.001) FROM unnest(a_axes, b_axes) AS o (x, y))
$$
"""


def upgrade() -> None:
    add, check = op.add_column, op.create_check_constraint
    text, integer = sa.Text(), sa.Integer()
    bytes_, big = sa.LargeBinary(), sa.BigInteger()

    hashed = "What of each file was hashed: full, head or none."
    add("ingest_run", sa.Column("hash", text, server_default="full", nullable=False, comment=hashed))
    fell_back = "DICOM files whose header was left to pydicom."
    add("ingest_run", sa.Column("fell_back", big, server_default="0", nullable=False, comment=fell_back))
    add("ingest_run", sa.Column("undone_at", sa.DateTime(timezone=True), comment="When what it brought was taken out again."))

    what_reads = "What reads it: dicom, contour, nifti, idx, raster, …; none: nothing."
    add("file", sa.Column("format", text, server_default="dicom", nullable=False, comment=what_reads))
    said = "CRC-32 of what its layout says about it (patient, structure, options); where that changes it is read again."
    add("file", sa.Column("read_as", big, server_default="0", nullable=False, comment=said))
    content = "sha256 of its bytes, or of the first 64 KiB and the size (--hash head); NULL: not asked for."
    add("file", sa.Column("content_hash", bytes_, comment=content))
    add("file", sa.Column("instance_id", big, comment="The SOP object in it, if it has no image."))
    add("file", sa.Column("first_run_id", big, comment="The run that first found it."))
    op.create_foreign_key(op.f("fk_file_instance_id_instance"), "file", "instance", ["instance_id"], ["id"])
    op.create_foreign_key(op.f("fk_file_first_run_id_ingest_run"), "file", "ingest_run", ["first_run_id"], ["id"])
    op.create_index("ix_file_instance_id", "file", ["instance_id"], postgresql_where=sa.text("instance_id IS NOT NULL"))
    op.drop_constraint(op.f("ck_file_kind"), "file")
    check(op.f("ck_file_kind"), "file", "kind IN ('image', 'annotation', 'other')")
    op.alter_column("file", "kind", comment="What it holds: image, annotation, or other (a plan, a report).")
    op.execute("UPDATE file SET format = 'contour' WHERE kind = 'annotation'")

    frame_of_reference = "FrameOfReferenceUID (0020,0052), as found."
    add("instance", sa.Column("frame_of_reference_uid", text, server_default="", nullable=False, comment=frame_of_reference))
    op.alter_column("instance", "number_of_frames", comment="Frames; 0 for an object without pixels.")
    through_lut = "Its values go through a Modality LUT Sequence (0028,3000)."
    add("image", sa.Column("modality_lut", sa.Boolean(), server_default="false", nullable=False, comment=through_lut))
    op.alter_column("image", "pixel_hash", comment="sha256 of the stored values, C order, little endian; NULL until it is measured.")
    bits = "BitsStored (0028,0101) where nobody looked whether bits above it are in use: a read by offset clears them; else NULL."
    add("location", sa.Column("bits_stored", sa.SmallInteger(), comment=bits))
    coding = "gzip: the offset counts in what the file decompresses to."
    add("location", sa.Column("coding", text, server_default="", nullable=False, comment=coding))

    add("annotation", sa.Column("rows", integer, comment="Height of a segment's grid in px."))
    add("annotation", sa.Column("columns", integer, comment="Width of a segment's grid in px."))
    box = "What a segment's bits cover: first row, first column, rows, columns."
    add("annotation", sa.Column("box", sa.ARRAY(integer), comment=box))
    add("annotation", sa.Column("bits", bytes_, comment="A segment as read: numpy.packbits of its bounding box, C order."))
    op.drop_constraint(op.f("ck_annotation_convention"), "annotation")
    check(op.f("ck_annotation_convention"), "annotation", "convention IN ('corner', 'centre', 'patient')")
    whole = "num_nonnulls(rows, columns, box, bits) = CASE WHEN kind = 'segment' THEN 4 ELSE 0 END"
    check(op.f("ck_annotation_segment_whole"), "annotation", whole)
    points = "Polygon as read, never shifted: x, y, … in px (patient: x, y, z, … in mm), ring after ring."
    op.alter_column("annotation", "points", comment=points)
    convention = "corner: the centre of the first pixel is (0.5, 0.5); centre: it is (0, 0); patient: mm."
    op.alter_column("annotation", "convention", comment=convention)

    op.create_table(
        "measure",
        sa.Column("image_id", big, nullable=False, comment="Whose pixels."),
        sa.Column("minimum", sa.Double(), nullable=False, comment="Smallest value after the modality transform; NaN are left out."),
        sa.Column("maximum", sa.Double(), nullable=False, comment="Largest."),
        sa.Column("mean", sa.Double(), nullable=False, comment="Mean."),
        sa.Column("deviation", sa.Double(), nullable=False, comment="Standard deviation."),
        sa.Column(
            "entropy",
            sa.Double(),
            nullable=False,
            comment="Shannon entropy of its histogram of 256 equal bins from minimum to maximum, bits.",
        ),
        sa.Column("saturated", sa.Double(), nullable=False, comment="Share of pixels at the largest value."),
        sa.Column("nans", big, nullable=False, comment="Pixels that are no finite number."),
        sa.Column(
            "measured_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it was measured."
        ),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_measure_image_id_image"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("image_id", name=op.f("pk_measure")),
        comment="What `catalog measure` found in an image's pixels.",
    )
    refuses = "sha256 of salt and PatientID: an ingest refuses files of the patient."
    hashed_paths = "sha256 of salt, root.id, / and path of each annotation file."
    went = "image.id of what went: orders of epochs name them still."
    key = "Surrogate key; means nothing outside this database."
    op.create_table(
        "erasure",
        sa.Column("id", big, sa.Identity(always=True), nullable=False, comment=key),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When."),
        sa.Column("actor", text, nullable=False, comment="Who erased the patient."),
        sa.Column("reason", text, nullable=False, comment="Why, in words."),
        sa.Column("salt", bytes_, nullable=False, comment="Random bytes before what is hashed."),
        sa.Column("patient_sha256", bytes_, nullable=False, comment=refuses),
        sa.Column("file_sha256s", sa.ARRAY(bytes_), nullable=False, comment=hashed_paths),
        sa.Column("annotations", big, nullable=False, comment="Annotations that went, all versions."),
        sa.Column("image_ids", sa.ARRAY(big), nullable=False, comment=went),
        sa.CheckConstraint("length(patient_sha256) = 32 AND length(salt) >= 16", name=op.f("ck_erasure_hashed")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasure")),
        comment="A patient whose rows were deleted. Nothing here says who it was.",
    )
    for subject in ("file_id", "image_id", "annotation_id", "pairing_id", "series_id", "study_id", "patient_id"):
        op.create_index(f"ix_flag_{subject}", "flag", [subject], postgresql_where=sa.text(f"{subject} IS NOT NULL"))
    op.execute(NUMBERS)
    op.execute(PLANE_DISTANCE)
    op.execute(SAME_GRID)


def downgrade() -> None:
    raise RuntimeError("segments and objects without images have no place in the schema before: restore a dump instead")
