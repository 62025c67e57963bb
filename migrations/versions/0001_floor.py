"""The floor: storage, the four DICOM levels, annotations, pairings, masks, flags, streams, orders and the ledger."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import INT8MULTIRANGE, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# One row for each thing that was drawn on an image by an accepted pairing: all readers, all versions.
# The flags of a subject are counted once per subject and joined: seven small hash joins, where a subquery per row would
# look into the index seven times a row.
ANNOTATION_ALL = """
CREATE VIEW annotation_all AS
SELECT i.id AS sample_id, i.sample_key, a.id AS annotation_id, r.name AS reader, pt.patient_id AS patient,
       st.study_instance_uid, se.series_instance_uid, ins.sop_instance_uid, i.frame, ins.instance_number, se.modality,
       s.name AS structure, a.kind, a.label, ro.url || '/' || fi.path AS path, i.rows, i.columns, i.position, i.phase,
       i.trigger_time, m.area_px, m.area_px * i.row_spacing * i.column_spacing AS area_mm2, p.method AS pairing_method,
       a.origin, i.pixel_hash,
       coalesce(f_image.open, 0) + coalesce(f_file.open, 0) + coalesce(f_annotation.open, 0) + coalesce(f_pairing.open, 0)
           + coalesce(f_series.open, 0) + coalesce(f_study.open, 0) + coalesce(f_patient.open, 0) AS open_flags,
       coalesce(f_image.error, 0) + coalesce(f_file.error, 0) + coalesce(f_annotation.error, 0) + coalesce(f_pairing.error, 0)
           + coalesce(f_series.error, 0) + coalesce(f_study.error, 0) + coalesce(f_patient.error, 0) AS error_flags,
       i.row_spacing, i.column_spacing, a.polygon_area_px, a.version, a.current, p.state AS pairing_state,
       r.preference AS reader_preference, p.id AS pairing_id, s.id AS structure_id, fi.id AS file_id
FROM annotation a
JOIN pairing p ON p.annotation_id = a.id
JOIN image i ON i.id = p.image_id
JOIN instance ins ON ins.id = i.instance_id
JOIN series se ON se.id = ins.series_id
JOIN study st ON st.id = se.study_id
JOIN patient pt ON pt.id = st.patient_id
JOIN structure s ON s.id = a.structure_id
JOIN reader r ON r.id = a.reader_id
LEFT JOIN mask m ON m.pairing_id = p.id
LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file fi ON fi.id = l.file_id
LEFT JOIN root ro ON ro.id = fi.root_id
@FLAGS@
LEFT JOIN (@COUNT annotation_id@) f_annotation ON f_annotation.annotation_id = a.id
LEFT JOIN (@COUNT pairing_id@) f_pairing ON f_pairing.pairing_id = p.id
"""

# The sample of the contract: current version, accepted pairing, and of several annotations of one image and structure the one
# that was drawn rather than derived, by the reader of the smallest preference.
SAMPLE = """
CREATE VIEW sample AS
SELECT sample_id, sample_key, annotation_id, reader, patient, study_instance_uid, series_instance_uid, sop_instance_uid, frame,
       instance_number, modality, structure, kind, label, path, rows, columns, position, phase, trigger_time, area_px, area_mm2,
       pairing_method, origin, pixel_hash, open_flags, error_flags, row_spacing, column_spacing, polygon_area_px, file_id
FROM annotation_all x
WHERE current AND pairing_state = 'accepted' AND NOT EXISTS (
    -- q.id <> x.pairing_id: most images have one annotation of a structure, and for these one look-up in an index is all.
    SELECT FROM pairing q
    JOIN annotation b ON b.id = q.annotation_id
    JOIN reader r ON r.id = b.reader_id
    WHERE q.image_id = x.sample_id AND q.id <> x.pairing_id AND q.state = 'accepted' AND b.current AND b.structure_id = x.structure_id
      AND (b.origin IN ('interpolated', 'proposed'), r.preference, b.id)
        < (x.origin IN ('interpolated', 'proposed'), x.reader_preference, x.annotation_id)
)
"""

IMAGE_ALL = """
CREATE VIEW image_all AS
SELECT i.id AS sample_id, i.sample_key, pt.patient_id AS patient, st.study_instance_uid, se.series_instance_uid,
       ins.sop_instance_uid, i.frame, ins.instance_number, se.modality, ro.url || '/' || fi.path AS path, i.rows, i.columns,
       i.position, i.phase, i.trigger_time, i.pixel_hash,
       coalesce(f_image.open, 0) + coalesce(f_file.open, 0) + coalesce(f_series.open, 0) + coalesce(f_study.open, 0)
           + coalesce(f_patient.open, 0) AS open_flags,
       coalesce(f_image.error, 0) + coalesce(f_file.error, 0) + coalesce(f_series.error, 0) + coalesce(f_study.error, 0)
           + coalesce(f_patient.error, 0) AS error_flags,
       i.row_spacing, i.column_spacing, fi.id AS file_id
FROM image i
JOIN instance ins ON ins.id = i.instance_id
JOIN series se ON se.id = ins.series_id
JOIN study st ON st.id = se.study_id
JOIN patient pt ON pt.id = st.patient_id
LEFT JOIN location l ON l.image_id = i.id AND l.preferred
LEFT JOIN file fi ON fi.id = l.file_id
LEFT JOIN root ro ON ro.id = fi.root_id
@FLAGS@
"""

FLAGS = """
LEFT JOIN (@COUNT image_id@) f_image ON f_image.image_id = i.id
LEFT JOIN (SELECT k.image_id, count(*) AS open, count(*) FILTER (WHERE g.severity = 'error') AS error
           FROM flag g JOIN location k ON k.file_id = g.file_id WHERE g.state = 'open' GROUP BY k.image_id) f_file ON f_file.image_id = i.id
LEFT JOIN (@COUNT series_id@) f_series ON f_series.series_id = se.id
LEFT JOIN (@COUNT study_id@) f_study ON f_study.study_id = st.id
LEFT JOIN (@COUNT patient_id@) f_patient ON f_patient.patient_id = pt.id
"""

COUNT = """SELECT {0}, count(*) AS open, count(*) FILTER (WHERE severity = 'error') AS error
           FROM flag WHERE state = 'open' AND {0} IS NOT NULL GROUP BY {0}"""

# What became of every position. Multiranges do the arithmetic: what was planned less what has an outcome is missing; what
# has two outcomes in two rows counts twice. Unreadable positions lie inside a delivered reservation and are taken out of it.
EPOCH_COVERAGE = """
CREATE VIEW epoch_coverage AS
SELECT r.name AS run, e.stream_id AS stream, e.epoch, e.num_samples AS planned,
       length_of(coalesce(c.delivered, '{}') - coalesce(c.unreadable, '{}')) AS delivered,
       length_of(coalesce(c.acknowledged, '{}') - coalesce(c.unreadable, '{}')) AS acknowledged,
       length_of(c.dropped) AS dropped, length_of(c.revoked) AS revoked, length_of(c.unreadable) AS unreadable,
       e.num_samples - length_of(c.touched) AS missing,
       coalesce(c.delivered_length, 0) - length_of(c.delivered) AS twice
FROM epoch e
JOIN run r ON r.id = e.run_id
LEFT JOIN (
    SELECT epoch_id, range_agg(positions) AS touched, sum(length_of(positions)) FILTER (WHERE outcome = 'delivered')::bigint AS delivered_length,
           range_agg(positions) FILTER (WHERE outcome = 'delivered') AS delivered, range_agg(acknowledged) AS acknowledged,
           range_agg(positions) FILTER (WHERE outcome = 'dropped') AS dropped,
           range_agg(positions) FILTER (WHERE outcome = 'revoked') AS revoked,
           range_agg(positions) FILTER (WHERE outcome = 'unreadable') AS unreadable
    FROM ledger GROUP BY epoch_id
) c ON c.epoch_id = e.id
WHERE e.started_at IS NOT NULL
"""

LENGTH_OF = """
CREATE FUNCTION length_of(positions int8multirange) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM unnest(positions) AS r $$
"""

# Design 5: what the sample is, and not where or when it was ingested, so that the same content has the same order on any server.
# A missing UID, or one that several contents claim, takes the pixels too; if those are equal as well, the path.
SAMPLE_KEY = """
CREATE FUNCTION sample_key(sop_instance_uid text, frame integer, pixel_hash bytea DEFAULT '', path text DEFAULT '') RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT encode(substring(sha256(convert_to(sop_instance_uid, 'UTF8') || '\\x00'::bytea || int4send(frame) || pixel_hash
                                   || convert_to(path, 'UTF8')) FROM 1 FOR 16), 'hex')::uuid
$$
"""

COMMENTS = {
    "annotation_all": "Annotations with their pairings: all readers, versions and states.",
    "sample": "One row per image and structure: current version, accepted pairing, preferred reader. What is fed.",
    "image_all": "Every image, with or without annotations.",
    "epoch_coverage": "What became of every position of every epoch; missing and twice must be 0 for a finished one.",
}

# What an epoch's order depends on. A statement, not a row: COPY of a million rows notes one change.
WATCHED = ("root", "file", "patient", "study", "series", "instance", "image", "location", "reader", "structure", "annotation",
           "pairing", "mask", "flag")  # fmt: skip

NOTE_CHANGE = """
CREATE FUNCTION note_catalog_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO catalog_change (xid, at) VALUES (pg_current_xact_id()::text::bigint, now()) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$
"""


def view(text: str) -> str:
    text = text.replace("@FLAGS@", FLAGS)
    for subject in ("annotation_id", "pairing_id", "image_id", "series_id", "study_id", "patient_id"):
        text = text.replace(f"@COUNT {subject}@", COUNT.format(subject))
    return text


def upgrade() -> None:
    op.create_table(
        "catalog_change",
        sa.Column("xid", sa.BigInteger(), nullable=False, comment="Transaction that changed what can be fed."),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="When it began."),
        sa.PrimaryKeyConstraint("xid", "at", name=op.f("pk_catalog_change")),
        comment="One row a transaction that touched the catalog, written by triggers; their count tells a daemon to plan again.",
    )
    op.create_table(
        "patient",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("patient_id", sa.Text(), nullable=False, comment="PatientID (0010,0020), or the layout's name for the patient."),
        sa.Column(
            "original_id",
            sa.Text(),
            nullable=True,
            comment="The name under which the annotations' source knows the patient (Sunnybrook: link.csv).",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_patient")),
        sa.UniqueConstraint("patient_id", name=op.f("uq_patient_patient_id")),
        comment="A patient.",
    )
    op.create_table(
        "reader",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="Who drew: a person, a group, a program."),
        sa.Column(
            "preference",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="Of several readers of one image the smallest is fed.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reader")),
        sa.UniqueConstraint("name", name=op.f("uq_reader_name")),
        comment="Who draws annotations.",
    )
    op.create_table(
        "root",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="Short name of the storage place."),
        sa.Column("url", sa.Text(), nullable=False, comment="Absolute folder; files are relative to it: a moved root is one UPDATE."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the root was first ingested.",
        ),
        sa.CheckConstraint("name <> '' AND url <> ''", name=op.f("ck_root_not_empty")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_root")),
        sa.UniqueConstraint("name", name=op.f("uq_root_name")),
        sa.UniqueConstraint("url", name=op.f("uq_root_url")),
        comment="A storage place with a name.",
    )
    op.create_table(
        "run",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="The training's name; made up when none was given."),
        sa.Column("program_version", sa.Text(), nullable=False, comment="Version of scanfeed."),
        sa.Column("host", sa.Text(), nullable=False, comment="Machine of the daemon that opened it."),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it was opened."),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.UniqueConstraint("name", name=op.f("uq_run_name")),
        comment="One training.",
    )
    op.create_table(
        "sql_login",
        sa.Column("role", sa.Text(), nullable=False, comment="Login without write rights under which SQL given by users runs."),
        sa.Column("password", sa.Text(), nullable=False, comment="Its password; only the owner of the catalog can read this table."),
        sa.PrimaryKeyConstraint("role", name=op.f("pk_sql_login")),
        comment="The login for SQL that users give.",
    )
    op.create_table(
        "stream",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("name", sa.Text(), nullable=True, comment="NULL for a stream defined by a Feed's arguments alone."),
        sa.Column("definition", JSONB(), nullable=False, comment="What is fed: selection, structures, seed, batch size, …"),
        sa.Column("digest", sa.LargeBinary(), nullable=False, comment="sha256 of the definition as canonical JSON."),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was first asked for.",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stream")),
        sa.UniqueConstraint("name", name=op.f("uq_stream_name")),
        comment="A definition of what is fed.",
    )
    op.create_index("ix_stream_unnamed", "stream", ["digest"], unique=True, postgresql_where=sa.text("name IS NULL"))
    op.create_table(
        "structure",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="What was drawn: inner, outer, a ROI or segment name."),
        sa.CheckConstraint("name <> ''", name=op.f("ck_structure_not_empty")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_structure")),
        sa.UniqueConstraint("name", name=op.f("uq_structure_name")),
        comment="What can be drawn.",
    )
    op.create_table(
        "epoch",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("run_id", sa.BigInteger(), nullable=False, comment="The training."),
        sa.Column("stream_id", sa.BigInteger(), nullable=False, comment="What is fed."),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="Pass over the stream, from 0."),
        sa.Column("num_samples", sa.BigInteger(), nullable=False, comment="Positions planned."),
        sa.Column(
            "catalog_changes", sa.BigInteger(), nullable=False, comment="Rows of catalog_change seen by the transaction that planned it."
        ),
        sa.Column(
            "order_sha256",
            sa.LargeBinary(),
            nullable=True,
            comment="sha256 of the sample keys in order; NULL until the whole order is stored.",
        ),
        sa.Column(
            "planned_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When the order was taken."
        ),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When its first batch was asked for; NULL: prepared ahead, provisional.",
        ),
        sa.CheckConstraint("epoch >= 0 AND num_samples >= 0", name=op.f("ck_epoch_counted")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_epoch_run_id_run")),
        sa.ForeignKeyConstraint(["stream_id"], ["stream.id"], name=op.f("fk_epoch_stream_id_stream")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_epoch")),
        sa.UniqueConstraint("run_id", "stream_id", "epoch", name=op.f("uq_epoch_run_id_stream_id_epoch")),
        comment="One pass over a stream; its order lies in epoch_order.",
    )
    op.create_index(op.f("ix_epoch_stream_id"), "epoch", ["stream_id"], unique=False)
    op.create_table(
        "ingest_run",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("root_id", sa.BigInteger(), nullable=False, comment="What was ingested."),
        sa.Column(
            "layout", sa.Text(), nullable=False, comment="How images and annotations were found and paired: a name under catalog/layouts."
        ),
        sa.Column("state", sa.Text(), server_default="running", nullable=False, comment="running, finished, interrupted or failed."),
        sa.Column("program_version", sa.Text(), nullable=False, comment="Version of scanfeed."),
        sa.Column("host", sa.Text(), nullable=False, comment="Machine that read the files."),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it began."),
        sa.Column(
            "finished_at", sa.DateTime(timezone=True), nullable=True, comment="When it ended; NULL while running, or when it was killed."
        ),
        sa.Column("files_seen", sa.BigInteger(), server_default="0", nullable=False, comment="Files of the layout found in the root."),
        sa.Column("files_read", sa.BigInteger(), server_default="0", nullable=False, comment="Files new or changed, and therefore read."),
        sa.Column("errors", sa.BigInteger(), server_default="0", nullable=False, comment="Rows of ingest_error of this run."),
        sa.CheckConstraint("state IN ('running', 'finished', 'interrupted', 'failed')", name=op.f("ck_ingest_run_state")),
        sa.ForeignKeyConstraint(["root_id"], ["root.id"], name=op.f("fk_ingest_run_root_id_root")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingest_run")),
        comment="One ingest that had something to do. An ingest that finds nothing new leaves no row.",
    )
    op.create_index(op.f("ix_ingest_run_root_id"), "ingest_run", ["root_id"], unique=False)
    op.create_table(
        "study",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("patient_id", sa.BigInteger(), nullable=False, comment="Whose study."),
        sa.Column("study_instance_uid", sa.Text(), nullable=False, comment="StudyInstanceUID (0020,000D), as found."),
        sa.Column("study_date", sa.Text(), server_default="", nullable=False, comment="StudyDate (0008,0020), as found: may be no date."),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"], name=op.f("fk_study_patient_id_patient")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study")),
        sa.UniqueConstraint("patient_id", "study_instance_uid", name=op.f("uq_study_patient_id_study_instance_uid")),
        comment="A study. One UID under two patients is two rows and a finding.",
    )
    op.create_index(op.f("ix_study_study_instance_uid"), "study", ["study_instance_uid"], unique=False)
    op.create_table(
        "epoch_order",
        sa.Column("epoch_id", sa.BigInteger(), nullable=False, comment="Whose order."),
        sa.Column("part", sa.Integer(), nullable=False, comment="Positions 1024 * part and following."),
        sa.Column("sample_ids", sa.ARRAY(sa.BigInteger()), nullable=False, comment="image.id at each position."),
        sa.Column(
            "annotation_ids",
            sa.ARRAY(sa.BigInteger()),
            nullable=False,
            comment="Of the stream's first structure one a position, then of the next; 0: none.",
        ),
        sa.CheckConstraint("cardinality(sample_ids) BETWEEN 1 AND 1024", name=op.f("ck_epoch_order_part")),
        sa.ForeignKeyConstraint(["epoch_id"], ["epoch.id"], name=op.f("fk_epoch_order_epoch_id_epoch"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("epoch_id", "part", name=op.f("pk_epoch_order")),
        comment="The random permutation of an epoch, as the database made it: 1,024 positions a row.",
    )
    op.create_table(
        "file",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("root_id", sa.BigInteger(), nullable=False, comment="The storage place."),
        sa.Column("path", sa.Text(), nullable=False, comment="Relative to the root, with / between folders."),
        sa.Column("kind", sa.Text(), nullable=False, comment="What the layout takes it for: image or annotation."),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="Bytes, as catalogued."),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False, comment="Modification time as catalogued, ns since 1970."),
        sa.Column("state", sa.Text(), server_default="present", nullable=False, comment="present, missing (was there once) or unreadable."),
        sa.Column("ingest_run_id", sa.BigInteger(), nullable=False, comment="The run that last wrote this row."),
        sa.CheckConstraint("kind IN ('image', 'annotation')", name=op.f("ck_file_kind")),
        sa.CheckConstraint("path <> '' AND left(path, 1) <> '/'", name=op.f("ck_file_path_relative")),
        sa.CheckConstraint("state IN ('present', 'missing', 'unreadable')", name=op.f("ck_file_state")),
        sa.ForeignKeyConstraint(["ingest_run_id"], ["ingest_run.id"], name=op.f("fk_file_ingest_run_id_ingest_run")),
        sa.ForeignKeyConstraint(["root_id"], ["root.id"], name=op.f("fk_file_root_id_root")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file")),
        sa.UniqueConstraint("root_id", "path", name=op.f("uq_file_root_id_path")),
        comment="A file of a root, with the size and time by which a change is noticed.",
    )
    op.create_table(
        "ingest_error",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("ingest_run_id", sa.BigInteger(), nullable=False, comment="The run that met it."),
        sa.Column("path", sa.Text(), nullable=False, comment="File or folder, relative to the root."),
        sa.Column("stage", sa.Text(), nullable=False, comment="find, read, pair or mask."),
        sa.Column("code", sa.Text(), nullable=False, comment="Short stable name of the error."),
        sa.Column("message", sa.Text(), nullable=False, comment="What, so what, what to do. Never holds the value of an identifying tag."),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it was met."),
        sa.CheckConstraint("stage IN ('find', 'read', 'pair', 'mask')", name=op.f("ck_ingest_error_stage")),
        sa.ForeignKeyConstraint(
            ["ingest_run_id"], ["ingest_run.id"], name=op.f("fk_ingest_error_ingest_run_id_ingest_run"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingest_error")),
        comment="What could not be taken in. Everything else went on.",
    )
    op.create_index(op.f("ix_ingest_error_ingest_run_id"), "ingest_error", ["ingest_run_id"], unique=False)
    op.create_table(
        "ledger",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("epoch_id", sa.BigInteger(), nullable=False, comment="Run, stream and epoch."),
        sa.Column("attempt", sa.Integer(), server_default="1", nullable=False, comment="Uninterrupted stretch of the run, from 1."),
        sa.Column(
            "outcome", sa.Text(), nullable=False, comment="delivered (durable before it is announced), dropped, unreadable or revoked."
        ),
        sa.Column("positions", INT8MULTIRANGE(), nullable=False, comment="Positions of the epoch's order with that outcome."),
        sa.Column(
            "acknowledged",
            INT8MULTIRANGE(),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Of these, what the trainer went on from.",
        ),
        sa.Column("consumer", sa.Text(), nullable=False, comment="host:pid of the training process."),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it became durable."),
        sa.CheckConstraint("outcome IN ('delivered', 'dropped', 'unreadable', 'revoked')", name=op.f("ck_ledger_outcome")),
        sa.CheckConstraint("NOT isempty(positions) AND acknowledged <@ positions", name=op.f("ck_ledger_positions")),
        sa.CheckConstraint("attempt >= 1", name=op.f("ck_ledger_attempt")),
        sa.ForeignKeyConstraint(["epoch_id"], ["epoch.id"], name=op.f("fk_ledger_epoch_id_epoch")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger")),
        sa.UniqueConstraint("epoch_id", "attempt", "outcome", "positions", name=op.f("uq_ledger_epoch_id_attempt_outcome_positions")),
        comment="What was delivered to whom.",
    )
    op.create_table(
        "series",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("study_id", sa.BigInteger(), nullable=False, comment="Its study."),
        sa.Column("series_instance_uid", sa.Text(), nullable=False, comment="SeriesInstanceUID (0020,000E), as found."),
        sa.Column("series_number", sa.Integer(), nullable=True, comment="SeriesNumber (0020,0011)."),
        sa.Column("modality", sa.Text(), server_default="", nullable=False, comment="Modality (0008,0060)."),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_series_study_id_study")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_series")),
        sa.UniqueConstraint("study_id", "series_instance_uid", name=op.f("uq_series_study_id_series_instance_uid")),
        comment="A series.",
    )
    op.create_index(op.f("ix_series_series_instance_uid"), "series", ["series_instance_uid"], unique=False)
    op.create_table(
        "annotation",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("file_id", sa.BigInteger(), nullable=False, comment="The file it was read from."),
        sa.Column(
            "source_key", sa.Text(), server_default="", nullable=False, comment="Which annotation in the file; empty when it holds one."
        ),
        sa.Column(
            "version",
            sa.Integer(),
            server_default="1",
            nullable=False,
            comment="From 1; a changed file is a new version, the old one stays.",
        ),
        sa.Column(
            "current", sa.Boolean(), server_default="true", nullable=False, comment="The newest version of what is still in its file."
        ),
        sa.Column("reader_id", sa.BigInteger(), nullable=False, comment="Who drew it."),
        sa.Column("structure_id", sa.BigInteger(), nullable=False, comment="What was drawn."),
        sa.Column("kind", sa.Text(), nullable=False, comment="polygon, segment or label."),
        sa.Column("origin", sa.Text(), nullable=False, comment="contour, segment, label (as drawn), interpolated or proposed (derived)."),
        sa.Column("label", sa.Text(), nullable=True, comment="The class, for kind label."),
        sa.Column(
            "points",
            sa.ARRAY(sa.Double()),
            nullable=True,
            comment="Polygon as read, never shifted: x, y, x, y, … in px, all rings one after another.",
        ),
        sa.Column("rings", sa.ARRAY(sa.Integer()), nullable=True, comment="Points in each ring; several rings are one mask by even-odd."),
        sa.Column(
            "convention", sa.Text(), nullable=True, comment="corner: the centre of the first pixel is (0.5, 0.5); centre: it is (0, 0)."
        ),
        sa.Column("shift_x", sa.Double(), server_default="0", nullable=False, comment="px added to x before the mask is made."),
        sa.Column("shift_y", sa.Double(), server_default="0", nullable=False, comment="px added to y before the mask is made."),
        sa.Column("polygon_area_px", sa.Double(), nullable=True, comment="Area of the polygon by the shoelace formula, px²."),
        sa.Column("content_hash", sa.LargeBinary(), nullable=False, comment="sha256 of what was drawn; equal content is no new version."),
        sa.Column(
            "refers_to",
            JSONB(),
            server_default="{}",
            nullable=False,
            comment="What the source says about its image, as found.",
        ),
        sa.Column("ingest_run_id", sa.BigInteger(), nullable=False, comment="The run that brought this version."),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it came in."),
        sa.CheckConstraint("(kind = 'label') = (label IS NOT NULL)", name=op.f("ck_annotation_label")),
        sa.CheckConstraint("convention IN ('corner', 'centre')", name=op.f("ck_annotation_convention")),
        sa.CheckConstraint("kind <> 'polygon' OR num_nonnulls(points, rings, convention) = 3", name=op.f("ck_annotation_polygon_whole")),
        sa.CheckConstraint("kind IN ('polygon', 'segment', 'label')", name=op.f("ck_annotation_kind")),
        sa.CheckConstraint("origin IN ('contour', 'segment', 'label', 'interpolated', 'proposed')", name=op.f("ck_annotation_origin")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_annotation_version")),
        sa.ForeignKeyConstraint(["file_id"], ["file.id"], name=op.f("fk_annotation_file_id_file")),
        sa.ForeignKeyConstraint(["ingest_run_id"], ["ingest_run.id"], name=op.f("fk_annotation_ingest_run_id_ingest_run")),
        sa.ForeignKeyConstraint(["reader_id"], ["reader.id"], name=op.f("fk_annotation_reader_id_reader")),
        sa.ForeignKeyConstraint(["structure_id"], ["structure.id"], name=op.f("fk_annotation_structure_id_structure")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_annotation")),
        sa.UniqueConstraint("file_id", "source_key", "version", name=op.f("uq_annotation_file_id_source_key_version")),
        comment="One thing a reader drew. Immutable: a correction is a new version.",
    )
    op.create_index("ix_annotation_current", "annotation", ["file_id", "source_key"], unique=True, postgresql_where=sa.text("current"))
    op.create_index(op.f("ix_annotation_structure_id"), "annotation", ["structure_id"], unique=False)
    op.create_table(
        "instance",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("series_id", sa.BigInteger(), nullable=False, comment="Its series."),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False, comment="SOPInstanceUID (0008,0018), as found; empty when missing."),
        sa.Column("sop_class_uid", sa.Text(), server_default="", nullable=False, comment="SOPClassUID (0008,0016)."),
        sa.Column("instance_number", sa.Integer(), nullable=True, comment="InstanceNumber (0020,0013)."),
        sa.Column("number_of_frames", sa.Integer(), nullable=False, comment="Frames, at least 1 for an image."),
        sa.Column("images_in_acquisition", sa.Integer(), nullable=True, comment="ImagesInAcquisition (0020,1002), as claimed by the file."),
        sa.Column(
            "content_hash",
            sa.LargeBinary(),
            nullable=True,
            comment="sha256 over the pixel hashes of all frames; tells a re-encoding from a conflict.",
        ),
        sa.CheckConstraint("content_hash IS NULL OR length(content_hash) = 32", name=op.f("ck_instance_content_hash")),
        sa.ForeignKeyConstraint(["series_id"], ["series.id"], name=op.f("fk_instance_series_id_series")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instance")),
        sa.UniqueConstraint(
            "series_id",
            "sop_instance_uid",
            "content_hash",
            name=op.f("uq_instance_series_id_sop_instance_uid_content_hash"),
            postgresql_nulls_not_distinct=True,
        ),
        comment="One SOP object.",
    )
    op.create_index(op.f("ix_instance_sop_instance_uid"), "instance", ["sop_instance_uid"], unique=False)
    op.create_table(
        "image",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("instance_id", sa.BigInteger(), nullable=False, comment="The SOP object it is a frame of."),
        sa.Column("frame", sa.Integer(), nullable=False, comment="Frame, counted from 0."),
        sa.Column("rows", sa.Integer(), nullable=False, comment="Height in px."),
        sa.Column("columns", sa.Integer(), nullable=False, comment="Width in px."),
        sa.Column("samples_per_pixel", sa.SmallInteger(), server_default="1", nullable=False, comment="SamplesPerPixel (0028,0002)."),
        sa.Column("photometric", sa.Text(), server_default="", nullable=False, comment="PhotometricInterpretation (0028,0004)."),
        sa.Column("row_spacing", sa.Double(), nullable=True, comment="PixelSpacing (0028,0030), first value: mm between rows."),
        sa.Column("column_spacing", sa.Double(), nullable=True, comment="PixelSpacing (0028,0030), second value: mm between columns."),
        sa.Column("image_position", sa.ARRAY(sa.Double()), nullable=True, comment="ImagePositionPatient (0020,0032): x, y, z in mm."),
        sa.Column(
            "image_orientation",
            sa.ARRAY(sa.Double()),
            nullable=True,
            comment="ImageOrientationPatient (0020,0037): direction of a row, then of a column.",
        ),
        sa.Column(
            "position",
            sa.Double(),
            nullable=True,
            comment="mm along the slice normal: image_position · (row direction × column direction).",
        ),
        sa.Column("slice_thickness", sa.REAL(), nullable=True, comment="SliceThickness (0018,0050) in mm."),
        sa.Column("trigger_time", sa.Double(), nullable=True, comment="TriggerTime (0018,1060) in ms."),
        sa.Column(
            "phase",
            sa.Integer(),
            nullable=True,
            comment="Rank of the trigger time among the images of the series at the same position, from 0.",
        ),
        sa.Column("slope", sa.Double(), server_default="1", nullable=False, comment="RescaleSlope (0028,1053); 1 when missing."),
        sa.Column("intercept", sa.Double(), server_default="0", nullable=False, comment="RescaleIntercept (0028,1052); 0 when missing."),
        sa.Column("pixel_hash", sa.LargeBinary(), nullable=True, comment="sha256 of the stored values, C order, little endian."),
        sa.Column("sample_key", sa.Uuid(), nullable=False, comment="What the sample is, on any server: sample_key(UID, frame)."),
        sa.CheckConstraint("cardinality(image_position) = 3 AND cardinality(image_orientation) = 6", name=op.f("ck_image_geometry")),
        sa.CheckConstraint("frame >= 0 AND rows > 0 AND columns > 0 AND samples_per_pixel > 0", name=op.f("ck_image_size")),
        sa.CheckConstraint("pixel_hash IS NULL OR length(pixel_hash) = 32", name=op.f("ck_image_pixel_hash")),
        sa.ForeignKeyConstraint(["instance_id"], ["instance.id"], name=op.f("fk_image_instance_id_instance")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_image")),
        sa.UniqueConstraint("instance_id", "frame", name=op.f("uq_image_instance_id_frame")),
        sa.UniqueConstraint("sample_key", name=op.f("uq_image_sample_key")),
        comment="One 2-D frame of an instance: what a sample is.",
    )
    op.create_index(
        "ix_image_no_phase",
        "image",
        ["instance_id"],
        unique=False,
        postgresql_where=sa.text("phase IS NULL AND trigger_time IS NOT NULL AND position IS NOT NULL"),
    )
    op.create_index("ix_image_pixel_hash", "image", ["pixel_hash"], unique=False, postgresql_using="hash")
    op.create_table(
        "location",
        sa.Column("image_id", sa.BigInteger(), nullable=False, comment="Whose pixels."),
        sa.Column("file_id", sa.BigInteger(), nullable=False, comment="The file they lie in."),
        sa.Column(
            "byte_offset", sa.BigInteger(), nullable=True, comment="Where the frame begins in the file; NULL when it must be decoded."
        ),
        sa.Column("byte_length", sa.BigInteger(), nullable=True, comment="Bytes of the frame; NULL when it must be decoded."),
        sa.Column(
            "dtype", sa.Text(), nullable=True, comment="Stored type and byte order as numpy writes it (<i2); NULL when pydicom must decode."
        ),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False, comment="TransferSyntaxUID (0002,0010)."),
        sa.Column("preferred", sa.Boolean(), nullable=False, comment="Read from here: a present file, by offset where there is one."),
        sa.CheckConstraint("num_nonnulls(byte_offset, byte_length, dtype) IN (0, 3)", name=op.f("ck_location_by_offset_whole")),
        sa.ForeignKeyConstraint(["file_id"], ["file.id"], name=op.f("fk_location_file_id_file")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_location_image_id_image"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("image_id", "file_id", name=op.f("pk_location")),
        comment="Where an image's pixels lie. One image may have several (re-encodings); one at most is preferred.",
    )
    op.create_index(op.f("ix_location_file_id"), "location", ["file_id"], unique=False)
    op.create_index("ix_location_preferred", "location", ["image_id"], unique=True, postgresql_where=sa.text("preferred"))
    op.create_table(
        "pairing",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("annotation_id", sa.BigInteger(), nullable=False, comment="What was drawn."),
        sa.Column("image_id", sa.BigInteger(), nullable=False, comment="On which image."),
        sa.Column("method", sa.Text(), nullable=False, comment="How it was found: file-number, instance-number, …"),
        sa.Column("rule", sa.Text(), nullable=False, comment="The rule in words, with what it matched."),
        sa.Column("score", sa.Double(), nullable=False, comment="How sure, 0 to 1."),
        sa.Column("state", sa.Text(), nullable=False, comment="proposed, accepted or rejected."),
        sa.Column("actor", sa.Text(), nullable=False, comment="Who decided: layout:NAME, or a person."),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When the state was decided."),
        sa.CheckConstraint("state IN ('proposed', 'accepted', 'rejected')", name=op.f("ck_pairing_state")),
        sa.CheckConstraint("score BETWEEN 0 AND 1", name=op.f("ck_pairing_score")),
        sa.ForeignKeyConstraint(["annotation_id"], ["annotation.id"], name=op.f("fk_pairing_annotation_id_annotation")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_pairing_image_id_image")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pairing")),
        sa.UniqueConstraint("annotation_id", "image_id", name=op.f("uq_pairing_annotation_id_image_id")),
        comment="Which annotation belongs to which image, and why.",
    )
    op.create_index("ix_pairing_accepted", "pairing", ["annotation_id"], unique=True, postgresql_where=sa.text("state = 'accepted'"))
    op.create_index(op.f("ix_pairing_image_id"), "pairing", ["image_id"], unique=False)
    op.create_table(
        "flag",
        sa.Column(
            "id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Surrogate key; means nothing outside this database."
        ),
        sa.Column("rule", sa.Text(), nullable=False, comment="Code of the rule that raised it."),
        sa.Column("rule_version", sa.Integer(), server_default="1", nullable=False, comment="Version of that rule."),
        sa.Column("severity", sa.Text(), nullable=False, comment="error, warning or info. Open errors keep a sample out of feeding."),
        sa.Column("state", sa.Text(), server_default="open", nullable=False, comment="open, resolved or false_positive."),
        sa.Column("detail", sa.Text(), nullable=False, comment="What was found, in words."),
        sa.Column("value", sa.Double(), nullable=True, comment="What was measured, where a number says it."),
        sa.Column("file_id", sa.BigInteger(), nullable=True, comment="Subject: a file."),
        sa.Column("image_id", sa.BigInteger(), nullable=True, comment="Subject: an image."),
        sa.Column("annotation_id", sa.BigInteger(), nullable=True, comment="Subject: an annotation."),
        sa.Column("pairing_id", sa.BigInteger(), nullable=True, comment="Subject: a pairing."),
        sa.Column("series_id", sa.BigInteger(), nullable=True, comment="Subject: a series."),
        sa.Column("study_id", sa.BigInteger(), nullable=True, comment="Subject: a study."),
        sa.Column("patient_id", sa.BigInteger(), nullable=True, comment="Subject: a patient."),
        sa.Column("raised_by", sa.Text(), nullable=False, comment="ingest, loaderd, or a person."),
        sa.Column("raised_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="When it was raised."),
        sa.Column("closed_by", sa.Text(), nullable=True, comment="Who closed it."),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True, comment="When it was closed."),
        sa.Column("reason", sa.Text(), nullable=True, comment="Why it was closed."),
        sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name=op.f("ck_flag_closed")),
        sa.CheckConstraint("severity IN ('error', 'warning', 'info')", name=op.f("ck_flag_severity")),
        sa.CheckConstraint("state IN ('open', 'resolved', 'false_positive')", name=op.f("ck_flag_state")),
        sa.CheckConstraint(
            "num_nonnulls(file_id, image_id, annotation_id, pairing_id, series_id, study_id, patient_id) = 1",
            name=op.f("ck_flag_one_subject"),
        ),
        sa.ForeignKeyConstraint(["annotation_id"], ["annotation.id"], name=op.f("fk_flag_annotation_id_annotation")),
        sa.ForeignKeyConstraint(["file_id"], ["file.id"], name=op.f("fk_flag_file_id_file")),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name=op.f("fk_flag_image_id_image")),
        sa.ForeignKeyConstraint(["pairing_id"], ["pairing.id"], name=op.f("fk_flag_pairing_id_pairing")),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"], name=op.f("fk_flag_patient_id_patient")),
        sa.ForeignKeyConstraint(["series_id"], ["series.id"], name=op.f("fk_flag_series_id_series")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_flag_study_id_study")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_flag")),
        comment="A finding on a file, image, annotation, pairing, series, study or patient.",
    )
    op.create_index(
        "ix_flag_open",
        "flag",
        ["rule", "file_id", "image_id", "annotation_id", "pairing_id", "series_id", "study_id", "patient_id"],
        unique=True,
        postgresql_where=sa.text("state = 'open'"),
        postgresql_nulls_not_distinct=True,
    )
    op.create_index(op.f("ix_flag_rule"), "flag", ["rule"], unique=False)
    op.create_table(
        "mask",
        sa.Column("pairing_id", sa.BigInteger(), nullable=False, comment="Annotation and image."),
        sa.Column("rows", sa.Integer(), nullable=False, comment="Height of the image's grid in px."),
        sa.Column("columns", sa.Integer(), nullable=False, comment="Width of the image's grid in px."),
        sa.Column("box_row", sa.Integer(), server_default="0", nullable=False, comment="First row that bits cover."),
        sa.Column("box_column", sa.Integer(), server_default="0", nullable=False, comment="First column that bits cover."),
        sa.Column("box_rows", sa.Integer(), nullable=False, comment="Rows that bits cover: the mask's bounding box; 0 if it is empty."),
        sa.Column("box_columns", sa.Integer(), nullable=False, comment="Columns that bits cover."),
        sa.Column(
            "bits", sa.LargeBinary(), nullable=False, comment="numpy.packbits of the box in C order, first pixel in the highest bit."
        ),
        sa.Column(
            "area_px", sa.BigInteger(), sa.Computed("bit_count(bits)", persisted=True), nullable=False, comment="Pixels in the mask."
        ),
        sa.CheckConstraint(
            "box_row >= 0 AND box_column >= 0 AND box_row + box_rows <= rows AND box_column + box_columns <= columns",
            name=op.f("ck_mask_box_inside"),
        ),
        sa.CheckConstraint("length(bits) = (box_rows::bigint * box_columns + 7) / 8", name=op.f("ck_mask_bits_fill_box")),
        sa.ForeignKeyConstraint(["pairing_id"], ["pairing.id"], name=op.f("fk_mask_pairing_id_pairing"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("pairing_id", name=op.f("pk_mask")),
        comment="The raster of an annotation on its image.",
    )

    op.execute(LENGTH_OF)
    op.execute(SAMPLE_KEY)
    for text in (ANNOTATION_ALL, SAMPLE, IMAGE_ALL, EPOCH_COVERAGE):
        op.execute(view(text))
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON VIEW {name} IS '{comment}'")
    op.execute(NOTE_CHANGE)
    for table in WATCHED:
        op.execute(
            f"CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON {table} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION note_catalog_change()"
        )


def downgrade() -> None:
    raise RuntimeError("there is nothing below the floor: drop the database instead")
