"""Quality: what rules find, what they look at, who decided what."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE shape (
    pairing_id BIGINT NOT NULL,
    points INTEGER,
    smallest_ring INTEGER,
    points_outside INTEGER,
    self_crossings INTEGER,
    gap_px DOUBLE PRECISION,
    step_px DOUBLE PRECISION,
    perimeter_px DOUBLE PRECISION,
    polygon_area_px DOUBLE PRECISION,
    polygon_hash BYTEA,
    components INTEGER NOT NULL,
    largest_px BIGINT NOT NULL,
    holes INTEGER NOT NULL,
    border_px INTEGER NOT NULL,
    centroid_row DOUBLE PRECISION,
    centroid_column DOUBLE PRECISION,
    centroid DOUBLE PRECISION[],
    CONSTRAINT pk_shape PRIMARY KEY (pairing_id),
    CONSTRAINT ck_shape_centroid CHECK (cardinality(centroid) = 3),
    CONSTRAINT fk_shape_pairing_id_pairing FOREIGN KEY(pairing_id) REFERENCES pairing (id) ON DELETE CASCADE
);
COMMENT ON TABLE shape IS 'What a mask and its polygon are like on their image: computed once, for rules.';
COMMENT ON COLUMN shape.pairing_id IS 'Annotation and image.';
COMMENT ON COLUMN shape.points IS 'Points of the polygon, all rings; NULL for a segment.';
COMMENT ON COLUMN shape.smallest_ring IS 'Distinct points of its ring that has fewest.';
COMMENT ON COLUMN shape.points_outside IS 'Points outside the image''s pixels, to their outer edges.';
COMMENT ON COLUMN shape.self_crossings IS 'Proper crossings of edges, of one ring with itself or another; 100 stands for more too.';
COMMENT ON COLUMN shape.gap_px IS 'From a ring''s last point to its first, the widest of its rings.';
COMMENT ON COLUMN shape.step_px IS 'Median distance of neighbouring points.';
COMMENT ON COLUMN shape.perimeter_px IS 'Length of the closed polygon, or of the mask''s outline along pixel edges.';
COMMENT ON COLUMN shape.polygon_area_px IS 'Area of the polygon in px by even-odd, on this image; NULL for a segment.';
COMMENT ON COLUMN shape.polygon_hash IS 'sha256 of the polygon, wherever its points begin and whichever way they run.';
COMMENT ON COLUMN shape.components IS 'Parts of the mask that touch by no edge (4-connected).';
COMMENT ON COLUMN shape.largest_px IS 'Pixels of its largest part.';
COMMENT ON COLUMN shape.holes IS 'Parts of the background that the mask encloses (8-connected).';
COMMENT ON COLUMN shape.border_px IS 'Pixels of the mask in the first or last row or column of the image.';
COMMENT ON COLUMN shape.centroid_row IS 'Mean row of the mask''s pixels, px; NULL if it is empty.';
COMMENT ON COLUMN shape.centroid_column IS 'Mean column.';
COMMENT ON COLUMN shape.centroid IS 'The same in mm of the patient: x, y, z; NULL where the image does not say where it lies.';

CREATE TABLE overlap (
    pairing_id BIGINT NOT NULL,
    other_id BIGINT NOT NULL,
    kind TEXT NOT NULL,
    apart DOUBLE PRECISION NOT NULL,
    pixels BIGINT NOT NULL,
    CONSTRAINT pk_overlap PRIMARY KEY (pairing_id, other_id),
    CONSTRAINT ck_overlap_kind CHECK (kind IN ('image', 'slice', 'phase')),
    CONSTRAINT fk_overlap_pairing_id_pairing FOREIGN KEY(pairing_id) REFERENCES pairing (id) ON DELETE CASCADE,
    CONSTRAINT fk_overlap_other_id_pairing FOREIGN KEY(other_id) REFERENCES pairing (id) ON DELETE CASCADE
);
CREATE INDEX ix_overlap_other_id ON overlap (other_id);
COMMENT ON TABLE overlap IS 'Masks that rules compare, and what they have in common: see catalog/overlaps.py.';
COMMENT ON COLUMN overlap.pairing_id IS 'The one mask.';
COMMENT ON COLUMN overlap.other_id IS 'The other: the one around it, the next slice, the next phase.';
COMMENT ON COLUMN overlap.kind IS 'image: on one image; slice, phase: the same structure and reader on the next one.';
COMMENT ON COLUMN overlap.apart IS 'mm along the slice normal from one to the other, or ms of trigger time; image: 0.';
COMMENT ON COLUMN overlap.pixels IS 'Pixels in both, where they lie one behind the other.';

CREATE TABLE edge_fit (
    pairing_id BIGINT NOT NULL,
    scores REAL[] NOT NULL,
    CONSTRAINT pk_edge_fit PRIMARY KEY (pairing_id),
    CONSTRAINT ck_edge_fit_scores CHECK (cardinality(scores) = 81),
    CONSTRAINT fk_edge_fit_pairing_id_pairing FOREIGN KEY(pairing_id) REFERENCES pairing (id) ON DELETE CASCADE
);
COMMENT ON TABLE edge_fit IS 'How well a polygon follows its image''s edges, as drawn and moved: `catalog measure` computes it.';
COMMENT ON COLUMN edge_fit.pairing_id IS 'Annotation and image.';
COMMENT ON COLUMN edge_fit.scores IS 'Mean gradient along the polygon at 9 × 9 shifts of -2…2 px, y by y; of mean 0.';

CREATE TABLE relation (
    inside TEXT NOT NULL,
    outside TEXT NOT NULL,
    actor TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_relation PRIMARY KEY (inside, outside),
    CONSTRAINT ck_relation_two CHECK (inside <> outside)
);
COMMENT ON TABLE relation IS 'Which structure lies inside which, for rules.';
COMMENT ON COLUMN relation.inside IS 'Name of the structure that lies inside.';
COMMENT ON COLUMN relation.outside IS 'Name of the one around it.';
COMMENT ON COLUMN relation.actor IS 'Who said so.';
COMMENT ON COLUMN relation.at IS 'When.';

CREATE TABLE rule_setting (
    rule TEXT NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    actor TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    reason TEXT NOT NULL,
    CONSTRAINT pk_rule_setting PRIMARY KEY (rule, name)
);
COMMENT ON TABLE rule_setting IS 'Parameters of rules that are not at their defaults.';
COMMENT ON COLUMN rule_setting.rule IS 'Code of a rule.';
COMMENT ON COLUMN rule_setting.name IS 'One of its parameters, or enabled.';
COMMENT ON COLUMN rule_setting.value IS 'What it is here instead of the rule''s default.';
COMMENT ON COLUMN rule_setting.actor IS 'Who set it.';
COMMENT ON COLUMN rule_setting.at IS 'When.';
COMMENT ON COLUMN rule_setting.reason IS 'Why.';

CREATE TABLE qa_run (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    started_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    changed_only BOOLEAN NOT NULL,
    complete BOOLEAN DEFAULT false NOT NULL,
    actor TEXT NOT NULL,
    program_version TEXT NOT NULL,
    CONSTRAINT pk_qa_run PRIMARY KEY (id)
);
COMMENT ON TABLE qa_run IS 'One `catalog qa run`.';
COMMENT ON COLUMN qa_run.id IS 'Surrogate key; means nothing outside this database.';
COMMENT ON COLUMN qa_run.started_at IS 'When it began.';
COMMENT ON COLUMN qa_run.finished_at IS 'When it ended; NULL while it runs, and if it was cut short.';
COMMENT ON COLUMN qa_run.changed_only IS 'Were only patients looked at of whom something had changed?';
COMMENT ON COLUMN qa_run.complete IS 'Did it end, and were all of our rules in it? From the last such one on, touched says what changed.';
COMMENT ON COLUMN qa_run.actor IS 'Who ran it.';
COMMENT ON COLUMN qa_run.program_version IS 'Version of scanfeed.';

CREATE TABLE qa_result (
    qa_run_id BIGINT NOT NULL,
    rule TEXT NOT NULL,
    rule_version INTEGER NOT NULL,
    findings BIGINT NOT NULL,
    raised BIGINT NOT NULL,
    closed BIGINT NOT NULL,
    not_evaluated BIGINT NOT NULL,
    why TEXT DEFAULT '' NOT NULL,
    seconds DOUBLE PRECISION NOT NULL,
    digest BYTEA NOT NULL,
    CONSTRAINT pk_qa_result PRIMARY KEY (qa_run_id, rule),
    CONSTRAINT fk_qa_result_qa_run_id_qa_run FOREIGN KEY(qa_run_id) REFERENCES qa_run (id) ON DELETE CASCADE
);
COMMENT ON TABLE qa_result IS 'What a rule found in a run.';
COMMENT ON COLUMN qa_result.qa_run_id IS 'Of which run.';
COMMENT ON COLUMN qa_result.rule IS 'Code of the rule.';
COMMENT ON COLUMN qa_result.rule_version IS 'Its version.';
COMMENT ON COLUMN qa_result.findings IS 'Subjects that fail it.';
COMMENT ON COLUMN qa_result.raised IS 'Flags that it raised.';
COMMENT ON COLUMN qa_result.closed IS 'Flags that closed themselves, as what they spoke of is no longer so.';
COMMENT ON COLUMN qa_result.not_evaluated IS 'Subjects that it could not look at.';
COMMENT ON COLUMN qa_result.why IS 'Why not.';
COMMENT ON COLUMN qa_result.seconds IS 'How long it took.';
COMMENT ON COLUMN qa_result.digest IS 'sha256 of the rule as it was: query, parameters, relations. Another one: --changed is not enough for it.';

CREATE UNLOGGED TABLE scope (
    series_id BIGSERIAL NOT NULL,
    study_id BIGINT NOT NULL,
    patient_id BIGINT NOT NULL,
    CONSTRAINT pk_scope PRIMARY KEY (series_id)
);
CREATE INDEX ix_scope_patient_id ON scope (patient_id);
CREATE INDEX ix_scope_study_id ON scope (study_id);
COMMENT ON TABLE scope IS 'What the `catalog qa run` that is running looks at; rules join it.';
COMMENT ON COLUMN scope.series_id IS 'A series to look at.';
COMMENT ON COLUMN scope.study_id IS 'Its study.';
COMMENT ON COLUMN scope.patient_id IS 'Its patient, all of whose series are here.';

CREATE TABLE touched (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    series_id BIGINT NOT NULL,
    CONSTRAINT pk_touched PRIMARY KEY (id)
);
COMMENT ON TABLE touched IS 'What `catalog qa run --changed` has to look at; triggers write it.';
COMMENT ON COLUMN touched.id IS 'Surrogate key; means nothing outside this database.';
COMMENT ON COLUMN touched.series_id IS 'In which something changed that a rule may look at.';

CREATE TABLE event (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    actor TEXT NOT NULL,
    subject TEXT NOT NULL,
    subject_id BIGINT,
    action TEXT NOT NULL,
    before JSONB,
    after JSONB,
    reason TEXT,
    login TEXT DEFAULT SESSION_USER NOT NULL,
    CONSTRAINT pk_event PRIMARY KEY (id)
);
CREATE INDEX ix_event_subject ON event (subject, subject_id);
COMMENT ON TABLE event IS 'Who decided what, when and why. Rows are never changed or deleted: the database refuses.';
COMMENT ON COLUMN event.id IS 'Surrogate key; means nothing outside this database.';
COMMENT ON COLUMN event.at IS 'When.';
COMMENT ON COLUMN event.actor IS 'Who: a person, ingest, qa, loaderd, layout:NAME.';
COMMENT ON COLUMN event.subject IS 'The table of what changed: flag, pairing, annotation, rule_setting, relation.';
COMMENT ON COLUMN event.subject_id IS 'Its id there.';
COMMENT ON COLUMN event.action IS 'insert, update or delete.';
COMMENT ON COLUMN event.before IS 'What changed, as it was.';
COMMENT ON COLUMN event.after IS 'What changed, as it is.';
COMMENT ON COLUMN event.reason IS 'Why, in words.';
COMMENT ON COLUMN event.login IS 'Login of the database under which it was done.';
"""

# In which series something changed. Plain inserts of series ids: two ingests never wait for each other here.
TOUCHED = {
    "instance": "SELECT series_id FROM {rows}",
    "image": "SELECT n.series_id FROM {rows} r JOIN instance n ON n.id = r.instance_id",
    "location": "SELECT n.series_id FROM {rows} r JOIN image i ON i.id = r.image_id JOIN instance n ON n.id = i.instance_id",
    "mask": "SELECT n.series_id FROM {rows} r JOIN pairing p ON p.id = r.pairing_id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id",
    "measure": "SELECT n.series_id FROM {rows} r JOIN image i ON i.id = r.image_id JOIN instance n ON n.id = i.instance_id",
    "pairing": "SELECT n.series_id FROM {rows} r JOIN image i ON i.id = r.image_id JOIN instance n ON n.id = i.instance_id",
    "shape": "SELECT n.series_id FROM {rows} r JOIN pairing p ON p.id = r.pairing_id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id",
    "edge_fit": "SELECT n.series_id FROM {rows} r JOIN pairing p ON p.id = r.pairing_id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id",
    "annotation": "SELECT n.series_id FROM {rows} r JOIN pairing p ON p.annotation_id = r.id JOIN image i ON i.id = p.image_id "
    "JOIN instance n ON n.id = i.instance_id",
    "file": "SELECT n.series_id FROM {rows} r JOIN location l ON l.file_id = r.id JOIN image i ON i.id = l.image_id "
    "JOIN instance n ON n.id = i.instance_id UNION SELECT n.series_id FROM {rows} r JOIN annotation a ON a.file_id = r.id "
    "JOIN pairing p ON p.annotation_id = a.id JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id "
    "UNION SELECT n.series_id FROM {rows} r JOIN instance n ON n.id = r.instance_id",
}
# A new location comes with a new image, or is a re-encoding of a known one, about which no rule asks.
ON = {"location": ("UPDATE", "DELETE"), "file": ("UPDATE",), "annotation": ("UPDATE",), "image": ("INSERT", "UPDATE")}

TOUCH = """
CREATE FUNCTION touch_{table}_{rows}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO touched (series_id) SELECT DISTINCT series_id FROM ({query}) AS s (series_id);
    RETURN NULL;
END $$
"""

# A person who closes what a rule raised, or opens it again, may err: the next run looks at it.
TOUCH_FLAG = """
CREATE FUNCTION touch_flag() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO touched (series_id)
    WITH decided AS (
        SELECT n.* FROM new_rows n JOIN old_rows o ON o.id = n.id
        WHERE n.raised_by = 'qa' AND n.state <> o.state AND n.closed_by IS DISTINCT FROM 'qa'
    ), drawn AS (
        SELECT p.image_id FROM decided d JOIN pairing p ON p.id = d.pairing_id
        UNION SELECT p.image_id FROM decided d JOIN pairing p ON p.annotation_id = d.annotation_id
        UNION SELECT p.image_id FROM decided d JOIN annotation a ON a.file_id = d.file_id JOIN pairing p ON p.annotation_id = a.id
        UNION SELECT l.image_id FROM decided d JOIN location l ON l.file_id = d.file_id
        UNION SELECT d.image_id FROM decided d
    )
    SELECT n.series_id FROM drawn w JOIN image i ON i.id = w.image_id JOIN instance n ON n.id = i.instance_id
    UNION SELECT n.series_id FROM decided d JOIN file f ON f.id = d.file_id JOIN instance n ON n.id = f.instance_id
    UNION SELECT d.series_id FROM decided d WHERE d.series_id IS NOT NULL
    UNION SELECT se.id FROM decided d JOIN series se ON se.study_id = d.study_id
    UNION SELECT se.id FROM decided d JOIN study st ON st.patient_id = d.patient_id JOIN series se ON se.study_id = st.id;
    RETURN NULL;
END $$;
CREATE TRIGGER touch_update AFTER UPDATE ON flag REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION touch_flag();
"""

# What of a row an event keeps: who decided what about which; no name, no UID, no path.
KEPT = {
    "flag": "'rule', {0}.rule, 'version', {0}.rule_version, 'severity', {0}.severity, 'state', {0}.state, 'value', {0}.value, "
    "'revokes', {0}.revokes, 'assigned_to', {0}.assigned_to, 'file', {0}.file_id, 'image', {0}.image_id, 'annotation', {0}.annotation_id, "
    "'pairing', {0}.pairing_id, 'series', {0}.series_id, 'study', {0}.study_id, 'patient', {0}.patient_id",
    "pairing": "'annotation', {0}.annotation_id, 'image', {0}.image_id, 'state', {0}.state, 'method', {0}.method, 'score', {0}.score",
    "annotation": "'file', {0}.file_id, 'version', {0}.version, 'current', {0}.current, 'shift_x', {0}.shift_x, 'shift_y', {0}.shift_y, "
    "'sha256', encode({0}.content_hash, 'hex')",
    "relation": "'inside', {0}.inside, 'outside', {0}.outside",
    "rule_setting": "'rule', {0}.rule, 'name', {0}.name, 'value', {0}.value",
}
# Who and why; where a row does not say, what the session says (SET catalog.actor, catalog.reason).
SESSION = "coalesce(nullif(current_setting('catalog.actor', true), ''), session_user)"
WHY = "nullif(current_setting('catalog.reason', true), '')"
WHO = {
    "flag": (
        "coalesce(nullif(current_setting('catalog.actor', true), ''), CASE WHEN n.state = 'open' THEN n.raised_by ELSE n.closed_by END, "
        "session_user)",
        f"coalesce({WHY}, n.reason)",
    ),
    "pairing": ("n.actor", f"coalesce({WHY}, n.rule)"),
    "annotation": ("coalesce(nullif(current_setting('catalog.actor', true), ''), 'ingest')", WHY),
    "relation": ("n.actor", WHY),
    "rule_setting": ("n.actor", "n.reason"),
}

RECORD = """
CREATE FUNCTION record_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO event (actor, subject, subject_id, action, after, reason)
        SELECT {who}, '{table}', {id_n}, 'insert', jsonb_strip_nulls(jsonb_build_object({kept_n})), {why} FROM new_rows n;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO event (actor, subject, subject_id, action, before, after, reason)
        SELECT {who}, '{table}', {id_n}, 'update', jsonb_strip_nulls(o.was), jsonb_strip_nulls(m.is_now), {why}
        FROM new_rows n JOIN old_rows p ON {same}
        CROSS JOIN LATERAL (SELECT jsonb_build_object({kept_p}) AS was) o CROSS JOIN LATERAL (SELECT jsonb_build_object({kept_n}) AS is_now) m
        WHERE o.was IS DISTINCT FROM m.is_now;
    ELSE
        INSERT INTO event (actor, subject, subject_id, action, before, reason)
        SELECT {session}, '{table}', {id_p}, 'delete', jsonb_strip_nulls(jsonb_build_object({kept_p})), {reason} FROM old_rows p;
    END IF;
    RETURN NULL;
END $$
"""

REFUSE = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%: rows are never changed or deleted', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON event FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""

REFERENCING = {
    "INSERT": "REFERENCING NEW TABLE AS new_rows",
    "UPDATE": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "DELETE": "REFERENCING OLD TABLE AS old_rows",
}


def upgrade() -> None:
    def add(table: str, name: str, kind: sa.types.TypeEngine[object], comment: str, default: str | None = None) -> None:
        op.add_column(table, sa.Column(name, kind, nullable=default is None, server_default=default, comment=comment))

    text, big, double, boolean = sa.Text(), sa.BigInteger(), sa.Double(), sa.Boolean()
    add("instance", "burned_in_annotation", text, "BurnedInAnnotation (0028,0301).", "")
    add("instance", "identity_removed", text, "PatientIdentityRemoved (0012,0062).", "")
    add("instance", "over_89", boolean, "Is the patient said to be older than 89? The age itself is not kept. NULL: nothing says.")
    add("instance", "identifying", sa.ARRAY(text),
        "Tags of identifying attributes that have a value, such as (0010,0010). The values are not kept. NULL: nobody looked yet.")  # fmt: skip
    add("instance", "gantry_tilt", double, "GantryDetectorTilt (0018,1120) in degrees.")
    add("instance", "other_meta_uid", boolean,
        "MediaStorageSOPInstanceUID (0002,0003) is there and is not SOPInstanceUID (0008,0018).", "false")  # fmt: skip
    add("instance", "surplus_bytes", big,
        "Bytes of uncompressed Pixel Data beyond rows × columns × samples × bits × frames and one byte of padding.", "0")  # fmt: skip
    add("measure", "near_hash", big, "64 bits that images which look alike share, all but a few; see catalog/nearness.py.")
    add("flag", "assigned_to", text, "Who looks after it.")
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(sa.text(statement.replace(":", "\\:")))
    op.execute("INSERT INTO relation (inside, outside, actor) VALUES ('inner', 'outer', 'scanfeed')")
    for table, query in TOUCHED.items():
        for rows in ("new_rows", "old_rows"):
            op.execute(TOUCH.format(table=table, rows=rows, query=query.format(rows=rows)))
        for event in ON.get(table, tuple(REFERENCING)):
            rows = "old_rows" if event == "DELETE" else "new_rows"
            op.execute(
                f"CREATE TRIGGER touch_{event.lower()} AFTER {event} ON {table} "
                f"REFERENCING {rows.split('_')[0].upper()} TABLE AS {rows} FOR EACH STATEMENT EXECUTE FUNCTION touch_{table}_{rows}()"
            )
    op.execute(TOUCH_FLAG)
    op.execute("INSERT INTO touched (series_id) SELECT id FROM series")
    for table, kept in KEPT.items():
        who, why = WHO[table]
        has_id = table in ("flag", "pairing", "annotation")
        same = "p.id = n.id" if has_id else {
            "relation": "(p.inside, p.outside) = (n.inside, n.outside)", "rule_setting": "(p.rule, p.name) = (n.rule, n.name)",
        }[table]  # fmt: skip
        op.execute(sa.text(RECORD.format(
            table=table, who=who, why=why, kept_n=kept.format("n"), kept_p=kept.format("p"), same=same, session=SESSION, reason=WHY,
            id_n="n.id" if has_id else "NULL::bigint", id_p="p.id" if has_id else "NULL::bigint",
        ).replace(":", "\\:")))  # fmt: skip
        for event, referencing in REFERENCING.items():
            op.execute(
                f"CREATE TRIGGER record_{event.lower()} AFTER {event} ON {table} {referencing} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION record_{table}()"
            )
    op.execute(REFUSE)


def downgrade() -> None:
    raise RuntimeError("an event log is not taken away: restore a dump instead")
