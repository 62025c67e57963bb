"""Sets: splits, snapshots, labels derived from labels, and catalogs that hold keyed hashes instead of identities."""

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE derivation (
    annotation_id BIGINT NOT NULL,
    method TEXT NOT NULL,
    along TEXT,
    first_id BIGINT NOT NULL,
    second_id BIGINT,
    fraction DOUBLE PRECISION,
    gap DOUBLE PRECISION,
    parameters JSONB DEFAULT '{}' NOT NULL,
    program_version TEXT NOT NULL,
    actor TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_derivation PRIMARY KEY (annotation_id),
    CONSTRAINT ck_derivation_along CHECK (along IN ('slices', 'phases')),
    CONSTRAINT ck_derivation_between CHECK (num_nonnulls(along, second_id, fraction, gap) IN (0, 4)),
    CONSTRAINT ck_derivation_inside CHECK (fraction > 0 AND fraction < 1 AND gap > 0),
    CONSTRAINT fk_derivation_annotation_id_annotation FOREIGN KEY(annotation_id) REFERENCES annotation (id) ON DELETE CASCADE,
    CONSTRAINT fk_derivation_first_id_annotation FOREIGN KEY(first_id) REFERENCES annotation (id) ON DELETE CASCADE,
    CONSTRAINT fk_derivation_second_id_annotation FOREIGN KEY(second_id) REFERENCES annotation (id) ON DELETE CASCADE
);
CREATE INDEX ix_derivation_first_id ON derivation (first_id);
CREATE INDEX ix_derivation_second_id ON derivation (second_id);
COMMENT ON TABLE derivation IS 'Where a label came from that nobody drew. When a parent is rejected or replaced, so is what was made from it.';
COMMENT ON COLUMN derivation.annotation_id IS 'What was derived: a segment of origin interpolated or proposed, in the file of its first parent.';
COMMENT ON COLUMN derivation.method IS 'How: shape, linear, nearest (interpolated); otsu, kmeans, edges (proposed).';
COMMENT ON COLUMN derivation.along IS 'slices: its parents lie on both sides in space; phases: before and after in time. NULL: proposed.';
COMMENT ON COLUMN derivation.first_id IS 'The annotation that it was made from; of two the one of smaller position or time.';
COMMENT ON COLUMN derivation.second_id IS 'The other one; NULL: proposed.';
COMMENT ON COLUMN derivation.fraction IS 'Where it lies between its parents: 0 is the first, 1 the second.';
COMMENT ON COLUMN derivation.gap IS 'From the first to the second: mm along the slice normal, or ms of trigger time.';
COMMENT ON COLUMN derivation.parameters IS 'What else the method was told, or found.';
COMMENT ON COLUMN derivation.program_version IS 'Version of scanfeed.';
COMMENT ON COLUMN derivation.actor IS 'Who asked for it.';
COMMENT ON COLUMN derivation.at IS 'When.';

CREATE TABLE split (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    name TEXT NOT NULL,
    parts TEXT[] NOT NULL,
    ratios DOUBLE PRECISION[],
    folds INTEGER,
    stratify TEXT,
    seed BIGINT,
    actor TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    frozen_by TEXT,
    frozen_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_split PRIMARY KEY (id),
    CONSTRAINT ck_split_name CHECK (name <> '' AND name !~ '[/:]'),
    CONSTRAINT ck_split_parts CHECK (cardinality(parts) >= 1 AND cardinality(ratios) = cardinality(parts)),
    CONSTRAINT ck_split_folds CHECK (folds >= 2),
    CONSTRAINT ck_split_frozen CHECK (num_nonnulls(frozen_by, frozen_at) IN (0, 2)),
    CONSTRAINT uq_split_name UNIQUE (name)
);
COMMENT ON TABLE split IS 'Who is trained on and who is held out: a part for each patient.';
COMMENT ON COLUMN split.id IS 'Surrogate key; means nothing outside this database.';
COMMENT ON COLUMN split.name IS 'Its name.';
COMMENT ON COLUMN split.parts IS 'Its parts: train, val, test.';
COMMENT ON COLUMN split.ratios IS 'Share of the patients that each part is to have; sum 1. NULL: imported.';
COMMENT ON COLUMN split.folds IS 'Folds over all parts but test; NULL: none.';
COMMENT ON COLUMN split.stratify IS 'Expression over view sample whose most frequent value is a patient''s stratum.';
COMMENT ON COLUMN split.seed IS 'Decides who comes where. NULL: imported.';
COMMENT ON COLUMN split.actor IS 'Who made it.';
COMMENT ON COLUMN split.created_at IS 'When.';
COMMENT ON COLUMN split.frozen_by IS 'Who froze it.';
COMMENT ON COLUMN split.frozen_at IS 'When: from then on nobody comes to it, moves or goes, but who is erased.';

CREATE TABLE split_patient (
    split_id BIGINT NOT NULL,
    patient_id BIGINT NOT NULL,
    part TEXT NOT NULL,
    fold INTEGER,
    stratum TEXT,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_split_patient PRIMARY KEY (split_id, patient_id),
    CONSTRAINT ck_split_patient_part CHECK (part <> '' AND part !~ '[/:]'),
    CONSTRAINT ck_split_patient_fold CHECK (fold >= 0),
    CONSTRAINT fk_split_patient_split_id_split FOREIGN KEY(split_id) REFERENCES split (id) ON DELETE CASCADE,
    CONSTRAINT fk_split_patient_patient_id_patient FOREIGN KEY(patient_id) REFERENCES patient (id) ON DELETE CASCADE
);
CREATE INDEX ix_split_patient_patient_id ON split_patient (patient_id);
COMMENT ON TABLE split_patient IS 'In which part of a split a patient is. Patients that share pixels are in the same: the database refuses anything else.';
COMMENT ON COLUMN split_patient.split_id IS 'The split.';
COMMENT ON COLUMN split_patient.patient_id IS 'The patient.';
COMMENT ON COLUMN split_patient.part IS 'Its part.';
COMMENT ON COLUMN split_patient.fold IS 'Its fold, from 0; NULL: the split has none, or the part is test.';
COMMENT ON COLUMN split_patient.stratum IS 'What it was stratified by, when it came in.';
COMMENT ON COLUMN split_patient.at IS 'When it came in.';

CREATE TABLE snapshot (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    name TEXT NOT NULL,
    sha256 BYTEA NOT NULL,
    structures TEXT[] NOT NULL,
    definition JSONB NOT NULL,
    num_samples BIGINT NOT NULL,
    num_patients BIGINT NOT NULL,
    program_version TEXT NOT NULL,
    actor TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_snapshot PRIMARY KEY (id),
    CONSTRAINT ck_snapshot_whole CHECK (name <> '' AND length(sha256) = 32 AND num_samples > 0),
    CONSTRAINT uq_snapshot_name UNIQUE (name)
);
COMMENT ON TABLE snapshot IS 'A frozen list of samples. Never changed or deleted: the database refuses.';
COMMENT ON COLUMN snapshot.id IS 'Surrogate key; means nothing outside this database.';
COMMENT ON COLUMN snapshot.name IS 'Its name.';
COMMENT ON COLUMN snapshot.sha256 IS 'Digest of what its samples are, whatever their ids, paths and order.';
COMMENT ON COLUMN snapshot.structures IS 'Structures (and labels) of which it has annotations, by name.';
COMMENT ON COLUMN snapshot.definition IS 'How its samples were chosen: where, split, origins, …';
COMMENT ON COLUMN snapshot.num_samples IS 'How many samples it has, erased ones too.';
COMMENT ON COLUMN snapshot.num_patients IS 'Of how many patients, when it was made.';
COMMENT ON COLUMN snapshot.program_version IS 'Version of scanfeed.';
COMMENT ON COLUMN snapshot.actor IS 'Who made it.';
COMMENT ON COLUMN snapshot.created_at IS 'When.';

CREATE TABLE snapshot_sample (
    snapshot_id BIGINT NOT NULL,
    number BIGINT NOT NULL,
    image_id BIGINT,
    sample_key UUID,
    part TEXT,
    fold INTEGER,
    sha256 BYTEA NOT NULL,
    erasure_id BIGINT,
    CONSTRAINT pk_snapshot_sample PRIMARY KEY (snapshot_id, number),
    CONSTRAINT ck_snapshot_sample_whole CHECK (length(sha256) = 32 AND number >= 0),
    CONSTRAINT ck_snapshot_sample_erased CHECK (num_nonnulls(image_id, sample_key) = CASE WHEN erasure_id IS NULL THEN 2 ELSE 0 END),
    CONSTRAINT fk_snapshot_sample_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (id),
    CONSTRAINT fk_snapshot_sample_image_id_image FOREIGN KEY(image_id) REFERENCES image (id),
    CONSTRAINT fk_snapshot_sample_erasure_id_erasure FOREIGN KEY(erasure_id) REFERENCES erasure (id)
);
CREATE UNIQUE INDEX ix_snapshot_sample_image_id ON snapshot_sample (image_id, snapshot_id) WHERE image_id IS NOT NULL;
COMMENT ON TABLE snapshot_sample IS 'A sample of a snapshot.';
COMMENT ON COLUMN snapshot_sample.snapshot_id IS 'The snapshot.';
COMMENT ON COLUMN snapshot_sample.number IS 'From 0, by sample key as it was then.';
COMMENT ON COLUMN snapshot_sample.image_id IS 'The image; NULL: its patient was erased.';
COMMENT ON COLUMN snapshot_sample.sample_key IS 'The image''s sample key when the snapshot was made; NULL: erased.';
COMMENT ON COLUMN snapshot_sample.part IS 'Its patient''s part in the split; NULL: the snapshot has none.';
COMMENT ON COLUMN snapshot_sample.fold IS 'And its fold.';
COMMENT ON COLUMN snapshot_sample.sha256 IS 'Digest of the sample: pixels, masks, structures, part. Stays when it is erased.';
COMMENT ON COLUMN snapshot_sample.erasure_id IS 'The erasure that took it out.';

CREATE TABLE snapshot_mask (
    snapshot_id BIGINT NOT NULL,
    number BIGINT NOT NULL,
    structure TEXT NOT NULL,
    pairing_id BIGINT NOT NULL,
    sha256 BYTEA NOT NULL,
    CONSTRAINT pk_snapshot_mask PRIMARY KEY (snapshot_id, number, structure),
    CONSTRAINT fk_snapshot_mask_snapshot_id_snapshot_sample FOREIGN KEY(snapshot_id, number) REFERENCES snapshot_sample (snapshot_id, number),
    CONSTRAINT ck_snapshot_mask_whole CHECK (length(sha256) = 32),
    CONSTRAINT fk_snapshot_mask_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (id),
    CONSTRAINT fk_snapshot_mask_pairing_id_pairing FOREIGN KEY(pairing_id) REFERENCES pairing (id)
);
CREATE INDEX ix_snapshot_mask_pairing_id ON snapshot_mask (pairing_id);
COMMENT ON TABLE snapshot_mask IS 'What was drawn on a sample of a snapshot.';
COMMENT ON COLUMN snapshot_mask.snapshot_id IS 'The snapshot.';
COMMENT ON COLUMN snapshot_mask.number IS 'Which of its samples.';
COMMENT ON COLUMN snapshot_mask.structure IS 'Structure or label.';
COMMENT ON COLUMN snapshot_mask.pairing_id IS 'Annotation, image and mask.';
COMMENT ON COLUMN snapshot_mask.sha256 IS 'Digest of the mask or label, its structure and origin.';

CREATE TABLE pseudonymization (
    "only" BOOLEAN DEFAULT 'true' NOT NULL,
    key_check BYTEA NOT NULL,
    dates TEXT NOT NULL,
    actor TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_pseudonymization PRIMARY KEY ("only"),
    CONSTRAINT ck_pseudonymization_only CHECK ("only"),
    CONSTRAINT ck_pseudonymization_dates CHECK (dates IN ('shift', 'drop'))
);
COMMENT ON TABLE pseudonymization IS 'A row: this catalog holds keyed hashes of patients, UIDs and paths. The key is not here.';
COMMENT ON COLUMN pseudonymization."only" IS 'There is one row, or none.';
COMMENT ON COLUMN pseudonymization.key_check IS 'HMAC of a constant under the key: another key is noticed by it.';
COMMENT ON COLUMN pseudonymization.dates IS 'shift: a patient''s dates are moved by some days; drop: they are not kept.';
COMMENT ON COLUMN pseudonymization.actor IS 'Who asked for it.';
COMMENT ON COLUMN pseudonymization.at IS 'When.';
"""

# What nobody but the owner and the daemon reads. Beside the catalog's own schema, so that a dump can leave it out as a whole:
# pg_dump --exclude-schema. A database may hold catalogs in several schemas.
PRIVATE = """
CREATE SCHEMA IF NOT EXISTS @PRIVATE@;
COMMENT ON SCHEMA @PRIVATE@ IS 'Where files of a pseudonymized catalog lie. Of any other catalog it is empty.';
CREATE TABLE @PRIVATE@.root_url (
    root_id BIGINT NOT NULL,
    url TEXT NOT NULL,
    CONSTRAINT pk_root_url PRIMARY KEY (root_id),
    CONSTRAINT uq_root_url_url UNIQUE (url),
    CONSTRAINT fk_root_url_root_id_root FOREIGN KEY(root_id) REFERENCES root (id) ON DELETE CASCADE
);
COMMENT ON TABLE @PRIVATE@.root_url IS 'The folders that roots stand for.';
COMMENT ON COLUMN @PRIVATE@.root_url.root_id IS 'The root, whose own url is a keyed hash.';
COMMENT ON COLUMN @PRIVATE@.root_url.url IS 'The folder.';
CREATE TABLE @PRIVATE@.file_path (
    file_id BIGINT NOT NULL,
    path TEXT NOT NULL,
    CONSTRAINT pk_file_path PRIMARY KEY (file_id),
    CONSTRAINT fk_file_path_file_id_file FOREIGN KEY(file_id) REFERENCES file (id) ON DELETE CASCADE
);
COMMENT ON TABLE @PRIVATE@.file_path IS 'The paths that files stand for.';
COMMENT ON COLUMN @PRIVATE@.file_path.file_id IS 'The file, whose own path is a keyed hash.';
COMMENT ON COLUMN @PRIVATE@.file_path.path IS 'Its path, relative to the root.';
CREATE TABLE @PRIVATE@.name (
    token TEXT NOT NULL,
    name TEXT NOT NULL,
    CONSTRAINT pk_name PRIMARY KEY (token)
);
COMMENT ON TABLE @PRIVATE@.name IS 'Names of structures and readers that were replaced, since they may hold whatever somebody typed.';
COMMENT ON COLUMN @PRIVATE@.name.token IS 'What stands for it.';
COMMENT ON COLUMN @PRIVATE@.name.name IS 'The name.'
"""

# A view reads with its owner's rights, so the right to read the private tables is asked for here, once a query.
PLACE = """
CREATE VIEW place AS
SELECT f.id AS file_id, f.root_id,
       CASE WHEN u.root_id IS NULL THEN r.url WHEN (SELECT may FROM privileged) THEN u.url END AS url,
       CASE WHEN p.file_id IS NULL THEN f.path WHEN (SELECT may FROM privileged) THEN p.path END AS path
FROM file f JOIN root r ON r.id = f.root_id
LEFT JOIN @PRIVATE@.root_url u ON u.root_id = f.root_id LEFT JOIN @PRIVATE@.file_path p ON p.file_id = f.id
"""
PRIVILEGED = """
CREATE VIEW privileged AS SELECT has_schema_privilege('@PRIVATE@', 'USAGE') AND has_table_privilege('@PRIVATE@.file_path', 'SELECT') AS may
"""

# As in 0001, but for the path, which comes from `place`, and for flags on what a derived label was made from, which count for it too.
ANNOTATION_ALL = """
CREATE OR REPLACE VIEW annotation_all AS
SELECT i.id AS sample_id, i.sample_key, a.id AS annotation_id, r.name AS reader, pt.patient_id AS patient,
       st.study_instance_uid, se.series_instance_uid, ins.sop_instance_uid, i.frame, ins.instance_number, se.modality,
       s.name AS structure, a.kind, a.label, pl.url || '/' || pl.path AS path, i.rows, i.columns, i.position, i.phase,
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
LEFT JOIN place pl ON pl.file_id = fi.id
@FLAGS@
LEFT JOIN (@DRAWN@) f_annotation ON f_annotation.annotation_id = a.id
LEFT JOIN (@COUNT pairing_id@) f_pairing ON f_pairing.pairing_id = p.id
"""

IMAGE_ALL = """
CREATE OR REPLACE VIEW image_all AS
SELECT i.id AS sample_id, i.sample_key, pt.patient_id AS patient, st.study_instance_uid, se.series_instance_uid,
       ins.sop_instance_uid, i.frame, ins.instance_number, se.modality, pl.url || '/' || pl.path AS path, i.rows, i.columns,
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
LEFT JOIN place pl ON pl.file_id = fi.id
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

# As in 0002, and with the digest of the snapshot that was fed.
RUN_PROVENANCE = """
CREATE OR REPLACE VIEW run_provenance AS
SELECT r.name AS run, f.stream_id AS stream, s.name AS stream_name, encode(s.digest, 'hex') AS stream_sha256, s.definition,
       (SELECT encode(k.sha256, 'hex') FROM snapshot k WHERE k.name = s.definition->>'snapshot') AS snapshot_sha256, coalesce(s.definition->'transforms', '[]'::jsonb) AS transforms,
       (SELECT array_agg(encode(e.order_sha256, 'hex') ORDER BY e.epoch) FROM epoch e
        WHERE e.run_id = r.id AND e.stream_id = s.id AND e.started_at IS NOT NULL) AS order_sha256s,
       (SELECT count(*) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS attempts,
       (SELECT jsonb_agg(DISTINCT t.versions) FROM attempt t WHERE t.run_id = r.id AND t.stream_id = s.id) AS daemon_versions,
       (SELECT jsonb_agg(DISTINCT c.versions) FROM consumer c WHERE c.run_id = r.id AND c.stream_id = s.id) AS trainer_versions,
       (SELECT array_agg(DISTINCT c.host || ':' || c.pid || ' rank ' || c.rank || ' of ' || c.num_ranks) FROM consumer c
        WHERE c.run_id = r.id AND c.stream_id = s.id) AS consumers,
       (SELECT array_agg(encode(n.model_sha256, 'hex') ORDER BY n.id) FROM run_note n
        WHERE n.run_id = r.id AND n.model_sha256 IS NOT NULL) AS models,
       r.program_version, r.host, r.created_at
FROM run r
JOIN (SELECT run_id, stream_id FROM attempt UNION SELECT run_id, stream_id FROM epoch) f ON f.run_id = r.id
JOIN stream s ON s.id = f.stream_id
"""

DRAWN = """SELECT annotation_id, count(*) AS open, count(*) FILTER (WHERE severity = 'error') AS error FROM (
               SELECT annotation_id, severity FROM flag WHERE state = 'open' AND annotation_id IS NOT NULL
               UNION ALL
               SELECT d.annotation_id, g.severity FROM flag g LEFT JOIN pairing q ON q.id = g.pairing_id
               JOIN derivation d ON coalesce(g.annotation_id, q.annotation_id) IN (d.first_id, d.second_id)
               WHERE g.state = 'open' AND num_nonnulls(g.annotation_id, g.pairing_id) = 1
           ) AS g GROUP BY annotation_id"""

COMMENTS = {
    "place": "Where files lie. In a pseudonymized catalog url and path are NULL for who may not know.",
    "privileged": "May who asks read where the files of a pseudonymized catalog lie?",
}

# A label that nobody drew stands and falls with what it was made from.
DERIVED = """
CREATE FUNCTION retire_derived() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[];
BEGIN
    IF TG_TABLE_NAME = 'pairing' THEN
        SELECT array_agg(DISTINCT p.id) INTO ids FROM old_rows o JOIN derivation d ON o.annotation_id IN (d.first_id, d.second_id)
        JOIN pairing p ON p.annotation_id = d.annotation_id LEFT JOIN pairing n ON n.id = o.id
        WHERE o.state = 'accepted' AND n.state IS DISTINCT FROM 'accepted' AND p.state <> 'rejected';
    ELSE
        SELECT array_agg(DISTINCT p.id) INTO ids FROM old_rows o JOIN derivation d ON o.id IN (d.first_id, d.second_id)
        JOIN pairing p ON p.annotation_id = d.annotation_id JOIN annotation n ON n.id = o.id
        WHERE o.current AND NOT n.current AND p.state <> 'rejected';
    END IF;
    IF ids IS NOT NULL THEN  -- an UPDATE of no row would fire this trigger again, and have daemons plan anew
        UPDATE pairing SET state = 'rejected', rule = 'what it was made from is not accepted any more', at = now() WHERE id = ANY(ids);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER retire_derived AFTER UPDATE ON pairing REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION retire_derived();
CREATE TRIGGER retire_derived_of_deleted AFTER DELETE ON pairing REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION retire_derived();
CREATE TRIGGER retire_derived AFTER UPDATE ON annotation REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION retire_derived();
CREATE FUNCTION delete_derived() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[];
BEGIN
    SELECT array_agg(a.id) INTO ids FROM old_rows o JOIN annotation a ON a.id = o.annotation_id;
    IF ids IS NOT NULL THEN
        DELETE FROM flag WHERE annotation_id = ANY(ids) OR pairing_id IN (SELECT id FROM pairing WHERE annotation_id = ANY(ids));
        DELETE FROM pairing WHERE annotation_id = ANY(ids);
        DELETE FROM annotation WHERE id = ANY(ids);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER delete_derived AFTER DELETE ON derivation REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION delete_derived();
"""

# Patients that share pixels lie on one side, whoever writes the row. Pixels that are all alike (a black frame) tie nobody together.
# The split's row is written, so that two who write at once see each other: a lock alone would let a REPEATABLE READ transaction that began
# before the other one ended go on with what it saw then. Pixels are grouped: a join of equal ones took 8.7 s for 4,000 black frames.
SPLITS = """
CREATE VIEW pixel_twin AS
SELECT DISTINCT a.patient_id, b.other_id
FROM (
    SELECT array_agg(DISTINCT st.patient_id) AS ids
    FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    LEFT JOIN measure m ON m.image_id = i.id AND m.minimum = m.maximum
    WHERE i.pixel_hash IS NOT NULL
    GROUP BY i.pixel_hash HAVING min(st.patient_id) <> max(st.patient_id) AND count(m.image_id) = 0
) AS shared, unnest(ids) AS a (patient_id), unnest(ids) AS b (other_id)
WHERE a.patient_id <> b.other_id;
CREATE FUNCTION guard_split() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    bad record;
BEGIN
    IF TG_OP = 'DELETE' THEN
        SELECT s.name INTO bad FROM old_rows o JOIN split s ON s.id = o.split_id JOIN patient p ON p.id = o.patient_id
        WHERE s.frozen_at IS NOT NULL LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'split %: is frozen, so nobody leaves it but who is erased', bad.name USING ERRCODE = 'check_violation';
        END IF;
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE' THEN
        SELECT s.name INTO bad FROM old_rows o JOIN split s ON s.id = o.split_id WHERE s.frozen_at IS NOT NULL LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'split %: is frozen, so nobody comes to it and nobody moves', bad.name USING ERRCODE = 'check_violation';
        END IF;
    END IF;
    UPDATE split SET name = name WHERE id IN (SELECT split_id FROM new_rows) AND frozen_at IS NULL;
    SELECT s.name INTO bad FROM new_rows n JOIN split s ON s.id = n.split_id WHERE s.frozen_at IS NOT NULL LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'split %: is frozen, so nobody comes to it and nobody moves', bad.name USING ERRCODE = 'check_violation';
    END IF;
    SELECT s.name, n.part INTO bad FROM new_rows n JOIN split s ON s.id = n.split_id
    WHERE n.part <> ALL (s.parts) OR (n.fold IS NULL) <> (s.folds IS NULL OR n.part = 'test') OR n.fold >= s.folds LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'split %: has no part % with such a fold', bad.name, bad.part USING ERRCODE = 'check_violation';
    END IF;
    SELECT s.name, n.part, o.part AS other INTO bad
    FROM new_rows n JOIN split s ON s.id = n.split_id JOIN pixel_twin t ON t.patient_id = n.patient_id
    JOIN split_patient o ON (o.split_id, o.patient_id) = (n.split_id, t.other_id)
    WHERE (o.part, o.fold) IS DISTINCT FROM (n.part, n.fold) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'split %: two patients that share pixels would lie on two sides, % and %', bad.name, bad.part, bad.other
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER guard_insert AFTER INSERT ON split_patient REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION guard_split();
CREATE TRIGGER guard_update AFTER UPDATE ON split_patient REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION guard_split();
CREATE TRIGGER guard_delete AFTER DELETE ON split_patient REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION guard_split();
CREATE FUNCTION guard_frozen() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'split %: is frozen', OLD.name USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER guard_frozen BEFORE UPDATE OR DELETE ON split FOR EACH ROW WHEN (OLD.frozen_at IS NOT NULL)
    EXECUTE FUNCTION guard_frozen();
CREATE FUNCTION guard_definition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'split %: only freezing changes it; make another', OLD.name USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER guard_definition BEFORE UPDATE ON split FOR EACH ROW
    WHEN ((OLD.parts, OLD.ratios, OLD.folds, OLD.stratify, OLD.seed) IS DISTINCT FROM (NEW.parts, NEW.ratios, NEW.folds, NEW.stratify, NEW.seed))
    EXECUTE FUNCTION guard_definition();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON split FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON split_patient FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""

# A snapshot's rows come in one transaction and stay. Of a patient who is erased, in that transaction, the digests alone are left.
SNAPSHOTS = """
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON snapshot FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON snapshot_sample FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON snapshot_mask FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE FUNCTION guard_snapshot() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    bad text;
BEGIN
    SELECT s.name INTO bad FROM new_rows n JOIN snapshot s ON s.id = n.snapshot_id
    WHERE s.xmin::text::bigint <> pg_current_xact_id()::text::bigint & 4294967295 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'snapshot %: is frozen, so nothing comes to it', bad USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER guard_insert AFTER INSERT ON snapshot_sample REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION guard_snapshot();
CREATE TRIGGER guard_insert AFTER INSERT ON snapshot_mask REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION guard_snapshot();
CREATE FUNCTION guard_snapshot_sample() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.erasure_id IS NULL AND NEW.erasure_id IS NOT NULL
        AND (OLD.snapshot_id, OLD.number, OLD.sha256) = (NEW.snapshot_id, NEW.number, NEW.sha256)
        AND (OLD.part, OLD.fold) IS NOT DISTINCT FROM (NEW.part, NEW.fold) AND EXISTS (
            SELECT FROM erasure e WHERE e.id = NEW.erasure_id AND e.xmin::text::bigint = pg_current_xact_id()::text::bigint & 4294967295
        ) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'a snapshot is frozen: its rows are never changed or deleted' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER guard_change BEFORE UPDATE OR DELETE ON snapshot_sample FOR EACH ROW EXECUTE FUNCTION guard_snapshot_sample();
CREATE FUNCTION guard_snapshot_mask() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        PERFORM FROM snapshot_sample s WHERE (s.snapshot_id, s.number) = (OLD.snapshot_id, OLD.number) AND s.erasure_id IS NOT NULL;
        IF FOUND THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION 'a snapshot is frozen: its rows are never changed or deleted' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER guard_change BEFORE UPDATE OR DELETE ON snapshot_mask FOR EACH ROW EXECUTE FUNCTION guard_snapshot_mask();
"""

# Who put whom on which side: as the other decisions are recorded (0004).
RECORD_SPLIT = """
CREATE FUNCTION record_split_patient() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    who text := coalesce(nullif(current_setting('catalog.actor', true), ''), session_user);
    why text := nullif(current_setting('catalog.reason', true), '');
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO event (actor, subject, subject_id, action, after, reason)
        SELECT who, 'split_patient', n.split_id, 'insert',
               jsonb_strip_nulls(jsonb_build_object('patient', n.patient_id, 'part', n.part, 'fold', n.fold)), why FROM new_rows n;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO event (actor, subject, subject_id, action, before, after, reason)
        SELECT who, 'split_patient', n.split_id, 'update',
               jsonb_strip_nulls(jsonb_build_object('patient', o.patient_id, 'part', o.part, 'fold', o.fold)),
               jsonb_strip_nulls(jsonb_build_object('patient', n.patient_id, 'part', n.part, 'fold', n.fold)), why
        FROM new_rows n JOIN old_rows o ON (o.split_id, o.patient_id) = (n.split_id, n.patient_id);
    ELSE
        INSERT INTO event (actor, subject, subject_id, action, before, reason)
        SELECT who, 'split_patient', o.split_id, 'delete',
               jsonb_strip_nulls(jsonb_build_object('patient', o.patient_id, 'part', o.part, 'fold', o.fold)), why FROM old_rows o;
    END IF;
    RETURN NULL;
END $$
"""
REFERENCING = {
    "INSERT": "REFERENCING NEW TABLE AS new_rows",
    "UPDATE": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "DELETE": "REFERENCING OLD TABLE AS old_rows",
}


def upgrade() -> None:
    conn = op.get_bind()
    schema = conn.execute(sa.text("SELECT current_schema()")).scalar_one()
    quoted = conn.dialect.identifier_preparer.quote
    private = quoted("private" if schema == "public" else f"{schema}_private")

    def run(text: str) -> None:
        for statement in text.replace("@PRIVATE@", private).split(";\n"):
            if statement.strip():
                op.execute(sa.text(statement.replace(":", "\\:")))

    run(TABLES)
    run(PRIVATE)
    run(PRIVILEGED)
    run(PLACE)
    for view in (ANNOTATION_ALL, IMAGE_ALL):
        filled = view.replace("@FLAGS@", FLAGS).replace("@DRAWN@", DRAWN)
        for subject in ("pairing_id", "image_id", "series_id", "study_id", "patient_id"):
            filled = filled.replace(f"@COUNT {subject}@", COUNT.format(subject))
        run(filled)
    run(RUN_PROVENANCE)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON VIEW {name} IS '{comment}'")
    for text in (DERIVED, SPLITS, SNAPSHOTS, RECORD_SPLIT):
        op.execute(sa.text(text.replace(":", "\\:")))
    op.execute("COMMENT ON VIEW pixel_twin IS 'Patients that share pixels with another: they belong on one side of a split.'")
    op.execute(
        "COMMENT ON COLUMN event.subject IS 'The table of what changed: flag, pairing, annotation, rule_setting, relation, split_patient.'"
    )
    for event, referencing in REFERENCING.items():
        op.execute(
            f"CREATE TRIGGER record_{event.lower()} AFTER {event} ON split_patient {referencing} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION record_split_patient()"
        )
    op.execute(
        "CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON split_patient "
        "FOR EACH STATEMENT EXECUTE FUNCTION note_catalog_change()"
    )
    # pg_temp comes last, as in 0005.
    op.execute(sa.text(f"ALTER FUNCTION record_split_patient() SET search_path = {quoted(schema)}, pg_temp"))
    run(Path(__file__).with_suffix(".sql").read_text("utf-8"))


def downgrade() -> None:
    raise RuntimeError("what is frozen is not taken away: restore a dump instead")
