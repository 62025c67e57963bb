CREATE VIEW area_profile AS
SELECT pt.patient_id AS patient, n.series_id, s.name AS structure, r.name AS reader, i.phase, i.trigger_time,
       round(i.position::numeric, 2)::float8 AS position, i.id AS sample_id, a.id AS annotation_id, m.area_px,
       round((m.area_px * i.row_spacing * i.column_spacing)::numeric, 2)::float8 AS area_mm2,
       round(m.area_px::numeric / nullif(lag(m.area_px) OVER along, 0) - 1, 4)::float8 AS change
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask m ON m.pairing_id = p.id
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
WHERE p.state = 'accepted'
WINDOW along AS (PARTITION BY n.series_id, a.structure_id, a.reader_id, i.phase ORDER BY i.position, i.id)
ORDER BY pt.patient_id, n.series_id, s.name, r.name, i.phase, position, i.id;

COMMENT ON VIEW area_profile IS 'Areas along slices and phases. One row an accepted current annotation with a mask, slice by slice along the normal within one phase; change says by which share the area differs from the slice before it. Contours that belong to another slice show as a jump there and back.';

COMMENT ON COLUMN area_profile.patient IS 'PatientID, or the layout''s name for the patient.';

COMMENT ON COLUMN area_profile.series_id IS 'The series.';

COMMENT ON COLUMN area_profile.structure IS 'What was drawn.';

COMMENT ON COLUMN area_profile.reader IS 'Who drew it.';

COMMENT ON COLUMN area_profile.phase IS 'Rank of the trigger time, from 0.';

COMMENT ON COLUMN area_profile.trigger_time IS 'TriggerTime in ms.';

COMMENT ON COLUMN area_profile.position IS 'mm along the slice normal, to 0.01.';

COMMENT ON COLUMN area_profile.sample_id IS 'The image.';

COMMENT ON COLUMN area_profile.annotation_id IS 'The annotation.';

COMMENT ON COLUMN area_profile.area_px IS 'Pixels in the mask.';

COMMENT ON COLUMN area_profile.area_mm2 IS 'The same in mm².';

COMMENT ON COLUMN area_profile.change IS 'Area less that of the slice before it, as a share of that; NULL for a first one.';

CREATE VIEW constraint_state AS
WITH here AS (
    SELECT c.oid, c.relname FROM pg_class c
    WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'event'::regclass) AND c.relname <> 'alembic_version'
), needed (relation, name, needs) AS (
    SELECT t, 'note_change', 'INSERT INTO catalog_change'
    FROM unnest(ARRAY['root', 'file', 'patient', 'study', 'series', 'instance', 'image', 'location', 'reader', 'structure', 'annotation',
                      'pairing', 'mask', 'flag']) AS t
    UNION ALL SELECT t, 'record_' || what, 'INSERT INTO event'
    FROM unnest(ARRAY['flag', 'pairing', 'annotation', 'relation', 'rule_setting']) AS t, unnest(ARRAY['insert', 'update', 'delete']) AS what
    UNION ALL SELECT t, 'touch_' || what, 'INSERT INTO touched'
    FROM unnest(ARRAY['instance', 'measure', 'pairing', 'shape', 'edge_fit']) AS t, unnest(ARRAY['insert', 'update', 'delete']) AS what
    UNION ALL SELECT t, 'touch_' || what, 'INSERT INTO touched'
    FROM (VALUES ('location', 'update'), ('location', 'delete'), ('file', 'update'), ('annotation', 'update'), ('image', 'insert'),
                 ('image', 'update')) AS o (t, what)
    UNION ALL VALUES ('event', 'refuse_change', 'RAISE EXCEPTION'), ('flag', 'notify_daemons', 'pg_notify'),
                     ('flag', 'notify_daemons_of_changes', 'pg_notify'), ('stream', 'notify_daemons', 'pg_notify')
)
SELECT 'trigger' AS what, n.relation, n.name,
       CASE WHEN g.oid IS NULL THEN 'is not there' ELSE 'its function does not do its work' END AS state
FROM needed n LEFT JOIN here h ON h.relname = n.relation LEFT JOIN pg_trigger g ON g.tgrelid = h.oid AND g.tgname = n.name
LEFT JOIN pg_proc f ON f.oid = g.tgfoid
WHERE g.oid IS NULL OR strpos(f.prosrc, n.needs) = 0
UNION ALL
SELECT CASE WHEN g.tgisinternal THEN 'constraint trigger' ELSE 'trigger' END, h.relname, g.tgname,
       CASE g.tgenabled WHEN 'D' THEN 'is disabled' ELSE 'fires on replicas alone' END
FROM pg_trigger g JOIN here h ON h.oid = g.tgrelid WHERE g.tgenabled NOT IN ('O', 'A')
UNION ALL
SELECT 'constraint', h.relname, c.conname, CASE WHEN c.convalidated THEN 'is not enforced' ELSE 'was not checked on the rows there' END
FROM pg_constraint c JOIN here h ON h.oid = c.conrelid
WHERE NOT c.convalidated OR to_jsonb(c)->>'conenforced' = 'false'
UNION ALL
SELECT 'index', h.relname, x.relname, 'is not valid'
FROM pg_index i JOIN here h ON h.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid WHERE NOT (i.indisvalid AND i.indisready AND i.indislive)
UNION ALL
SELECT 'row-level security', h.relname, coalesce(p.polname, h.relname), 'may show fewer rows without saying so'
FROM here h JOIN pg_class c ON c.oid = h.oid LEFT JOIN pg_policy p ON p.polrelid = h.oid WHERE c.relrowsecurity OR p.oid IS NOT NULL
UNION ALL
SELECT 'rule', h.relname, w.rulename, 'changes what statements on the table do'
FROM pg_rewrite w JOIN here h ON h.oid = w.ev_class WHERE w.rulename <> '_RETURN'
ORDER BY what, relation, name;

COMMENT ON VIEW constraint_state IS 'Guards of the schema that are off: must be empty. Triggers that are disabled or gone, constraints that were not checked, indexes that cannot be used, rules or row-level security that would hide or swallow rows. While one is off, the database does not hold what the other audits take for granted.';

COMMENT ON COLUMN constraint_state.what IS 'What kind of guard.';

COMMENT ON COLUMN constraint_state.relation IS 'On which table.';

COMMENT ON COLUMN constraint_state.name IS 'Its name.';

COMMENT ON COLUMN constraint_state.state IS 'What is wrong with it.';

CREATE VIEW deliveries AS
SELECT c.run, c.stream, c.stream_name, c.epoch, c.planned, c.delivered, c.acknowledged, c.dropped, c.revoked, c.unreadable, c.replayed,
       c.finished, l.consumers, c.started_at, l.last_at, c.pruned_at
FROM epoch_coverage c JOIN run r ON r.name = c.run
JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream AND e.epoch = c.epoch
LEFT JOIN (SELECT epoch_id, count(DISTINCT consumer) AS consumers, max(at) AS last_at FROM ledger GROUP BY epoch_id) l ON l.epoch_id = e.id
ORDER BY c.run, c.stream, c.epoch;

COMMENT ON VIEW deliveries IS 'What was fed. One row an epoch that began: of the positions planned, what was delivered, taken over by the trainer, dropped, revoked or unreadable. What must not be is in delivery_gaps.';

COMMENT ON COLUMN deliveries.run IS 'The training.';

COMMENT ON COLUMN deliveries.stream IS 'Number of the stream.';

COMMENT ON COLUMN deliveries.stream_name IS 'Its name, if it has one.';

COMMENT ON COLUMN deliveries.epoch IS 'Pass over the stream, from 0.';

COMMENT ON COLUMN deliveries.planned IS 'Positions of its order.';

COMMENT ON COLUMN deliveries.delivered IS 'Positions delivered.';

COMMENT ON COLUMN deliveries.acknowledged IS 'Of these, what the trainer went on from.';

COMMENT ON COLUMN deliveries.dropped IS 'Positions left out by the tail.';

COMMENT ON COLUMN deliveries.revoked IS 'Positions left out as somebody revoked them.';

COMMENT ON COLUMN deliveries.unreadable IS 'Positions whose files could not be read.';

COMMENT ON COLUMN deliveries.replayed IS 'Positions that a later attempt delivered again.';

COMMENT ON COLUMN deliveries.finished IS 'Does every position have an outcome?';

COMMENT ON COLUMN deliveries.consumers IS 'Processes that were given some of it.';

COMMENT ON COLUMN deliveries.started_at IS 'When its first batch was asked for.';

COMMENT ON COLUMN deliveries.last_at IS 'When its last row was written to the ledger.';

COMMENT ON COLUMN deliveries.pruned_at IS 'When its order and ledger were dropped; the numbers are kept.';

CREATE VIEW delivery_gaps AS
SELECT c.run, c.stream, c.epoch, c.planned, c.missing, c.twice, coalesce(l.beyond, 0) AS beyond
FROM epoch_coverage c JOIN run r ON r.name = c.run
JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream AND e.epoch = c.epoch
LEFT JOIN (
    SELECT x.epoch_id, length_of(range_agg(x.positions) - int8multirange(int8range(0, y.num_samples))) AS beyond
    FROM ledger x JOIN epoch y ON y.id = x.epoch_id GROUP BY x.epoch_id, y.num_samples
) l ON l.epoch_id = e.id
WHERE c.missing <> 0 OR c.twice <> 0 OR l.beyond <> 0
ORDER BY c.run, c.stream, c.epoch;

COMMENT ON VIEW delivery_gaps IS 'Positions that the ledger lost or counts twice: must be empty. One row an epoch of which a position has no outcome or two, or whose ledger speaks of positions that it does not have. What was fed is not known exactly there.';

COMMENT ON COLUMN delivery_gaps.run IS 'The training.';

COMMENT ON COLUMN delivery_gaps.stream IS 'Number of the stream.';

COMMENT ON COLUMN delivery_gaps.epoch IS 'Pass over the stream, from 0.';

COMMENT ON COLUMN delivery_gaps.planned IS 'Positions of its order.';

COMMENT ON COLUMN delivery_gaps.missing IS 'Positions without an outcome that should have one.';

COMMENT ON COLUMN delivery_gaps.twice IS 'Positions with two outcomes.';

COMMENT ON COLUMN delivery_gaps.beyond IS 'Positions in the ledger that its order does not have.';

CREATE VIEW duplicates AS
SELECT 'pixels' AS what, encode(i.pixel_hash, 'hex') AS content, count(*) AS count, count(DISTINCT st.patient_id) AS patients,
       count(DISTINCT n.series_id) AS series, (array_agg(i.id ORDER BY i.id))[:100] AS ids
FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
WHERE i.pixel_hash IS NOT NULL GROUP BY i.pixel_hash HAVING count(*) > 1
UNION ALL
SELECT 'file', encode(f.content_hash, 'hex'), count(*), NULL, NULL, (array_agg(f.id ORDER BY f.id))[:100]
FROM file f WHERE f.content_hash IS NOT NULL AND f.state = 'present' GROUP BY f.content_hash HAVING count(*) > 1
UNION ALL
SELECT 'uid', n.sop_instance_uid, count(*), count(DISTINCT st.patient_id), count(DISTINCT n.series_id), (array_agg(n.id ORDER BY n.id))[:100]
FROM instance n JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
WHERE n.sop_instance_uid <> '' GROUP BY n.sop_instance_uid HAVING count(*) > 1
ORDER BY what, count DESC, content;

COMMENT ON VIEW duplicates IS 'What is there more than once. One row a content that several images, files or objects have. The same pixels under two patients leak from one split into another; one SOPInstanceUID with several contents means that somebody wrote a file anew and kept its name.';

COMMENT ON COLUMN duplicates.what IS 'pixels (images with equal stored values), file (files with equal bytes) or uid (objects of one UID that differ).';

COMMENT ON COLUMN duplicates.content IS 'sha256 of what is equal, as hex; for uid the UID.';

COMMENT ON COLUMN duplicates.count IS 'How many have it.';

COMMENT ON COLUMN duplicates.patients IS 'Under how many patients they are; NULL for files.';

COMMENT ON COLUMN duplicates.series IS 'In how many series; NULL for files.';

COMMENT ON COLUMN duplicates.ids IS 'Their ids: image, file or instance, 100 at most.';

CREATE VIEW exposure AS
WITH relation AS (
    SELECT c.oid, c.relname, c.relowner, c.relkind = 'r' AS is_table FROM pg_class c
    WHERE c.relkind IN ('r', 'v') AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'event'::regclass)
), may AS (
    SELECT r.oid, r.rolname, r.rolcanlogin, r.rolsuper, c.relname, c.is_table, c.relowner = r.oid AS owned,
           has_table_privilege(r.oid, c.oid, 'SELECT') AS reads,
           has_table_privilege(r.oid, c.oid, 'INSERT, DELETE, TRUNCATE') OR has_any_column_privilege(r.oid, c.oid, 'INSERT, UPDATE') AS writes
    FROM pg_roles r CROSS JOIN relation c WHERE r.rolname !~ '^pg_'
)
SELECT m.rolname::text AS role, m.rolcanlogin AS may_log_in, m.rolsuper AS superuser,
       (SELECT string_agg(g.rolname, ', ' ORDER BY g.rolname) FROM pg_auth_members k JOIN pg_roles g ON g.oid = k.roleid
        WHERE k.member = m.oid) AS member_of,
       CASE WHEN bool_and(m.reads) THEN 'all' WHEN NOT bool_or(m.reads) THEN 'nothing'
            WHEN count(*) FILTER (WHERE NOT m.reads) <= 3 THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE NOT m.reads)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.reads) END AS reads,
       CASE WHEN bool_and(m.writes) FILTER (WHERE m.is_table) THEN 'all' WHEN NOT bool_or(m.writes) THEN 'nothing'
            WHEN count(*) FILTER (WHERE m.is_table AND NOT m.writes) <= 3
            THEN 'all but ' || string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.is_table AND NOT m.writes)
            ELSE string_agg(m.relname, ', ' ORDER BY m.relname) FILTER (WHERE m.writes) END AS writes,
       count(*) FILTER (WHERE m.owned) AS owns
FROM may m
GROUP BY m.oid, m.rolname, m.rolcanlogin, m.rolsuper HAVING bool_or(m.reads OR m.writes)
ORDER BY m.rolsuper DESC, m.rolname;

COMMENT ON VIEW exposure IS 'Who may read what, and who may change it. One row a role of the server that may read or write something of this catalog, with what it inherits from the roles it is a member of. A superuser may do everything, the triggers that guard the event log included.';

COMMENT ON COLUMN exposure.role IS 'The role.';

COMMENT ON COLUMN exposure.may_log_in IS 'Is it a login?';

COMMENT ON COLUMN exposure.superuser IS 'May it do everything?';

COMMENT ON COLUMN exposure.member_of IS 'Roles whose rights it has.';

COMMENT ON COLUMN exposure.reads IS 'What it may read: all, all but a few, or which tables and views.';

COMMENT ON COLUMN exposure.writes IS 'Tables of which it may add, change or delete rows, or some columns: all, all but a few, or which.';

COMMENT ON COLUMN exposure.owns IS 'How many tables and views it owns; an owner may alter them.';

CREATE VIEW flag_history AS
SELECT e.subject_id AS flag_id, coalesce(e.after, e.before)->>'rule' AS rule, e.at, e.actor, e.login, e.action,
       e.before->>'state' AS state_before, e.after->>'state' AS state_after, coalesce(e.after, e.before)->>'severity' AS severity,
       (e.before->>'value')::float8 AS value_before, (e.after->>'value')::float8 AS value_after, e.after->>'assigned_to' AS assigned_to, e.reason
FROM event e WHERE e.subject = 'flag'
ORDER BY e.subject_id, e.id;

COMMENT ON VIEW flag_history IS 'What was decided about flags. One row a change of a flag, from the event log: who raised, closed, reopened or gave it to whom, when and why. Flags that were raised before the log began (version 0004) have rows from then on.';

COMMENT ON COLUMN flag_history.flag_id IS 'The flag; it may be gone.';

COMMENT ON COLUMN flag_history.rule IS 'Code of the rule.';

COMMENT ON COLUMN flag_history.at IS 'When.';

COMMENT ON COLUMN flag_history.actor IS 'Who, as the program was told.';

COMMENT ON COLUMN flag_history.login IS 'Login of the database under which it was done.';

COMMENT ON COLUMN flag_history.action IS 'insert, update or delete.';

COMMENT ON COLUMN flag_history.state_before IS 'State before.';

COMMENT ON COLUMN flag_history.state_after IS 'State after.';

COMMENT ON COLUMN flag_history.severity IS 'Severity after, or before it was deleted.';

COMMENT ON COLUMN flag_history.value_before IS 'What was measured, before.';

COMMENT ON COLUMN flag_history.value_after IS 'What was measured, after.';

COMMENT ON COLUMN flag_history.assigned_to IS 'Who looks after it.';

COMMENT ON COLUMN flag_history.reason IS 'Why, in words.';

CREATE VIEW inventory AS
WITH held AS (
    SELECT f.root_id, l.image_id, bool_or(f.state = 'present') AS present FROM location l JOIN file f ON f.id = l.file_id
    GROUP BY f.root_id, l.image_id
), drawn AS (
    SELECT p.image_id, count(*) AS annotations FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current
    WHERE p.state = 'accepted' GROUP BY p.image_id
), counted AS (
    SELECT h.root_id, n.series_id, i.rows, i.columns, count(*) AS images, count(d.annotations) AS annotated, sum(d.annotations) AS annotations,
           count(*) FILTER (WHERE NOT h.present) AS not_present
    FROM held h JOIN image i ON i.id = h.image_id JOIN instance n ON n.id = i.instance_id LEFT JOIN drawn d ON d.image_id = i.id
    GROUP BY h.root_id, n.series_id, i.rows, i.columns
), known AS MATERIALIZED (
    SELECT c.*, se.modality, se.study_id, st.patient_id
    FROM counted c JOIN series se ON se.id = c.series_id JOIN study st ON st.id = se.study_id
), sizes AS (
    SELECT root_id, modality, string_agg(rows || '×' || columns, ', ' ORDER BY images DESC, rows, columns) AS sizes
    FROM (SELECT root_id, modality, rows, columns, sum(images) AS images FROM known GROUP BY root_id, modality, rows, columns) AS each
    GROUP BY root_id, modality
), structures AS (
    SELECT o.root_id, se.modality, string_agg(DISTINCT s.name, ', ') AS structures
    FROM (SELECT DISTINCT h.root_id, n.series_id, a.structure_id
          FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN held h ON h.image_id = p.image_id
          JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id WHERE p.state = 'accepted') AS o
    JOIN structure s ON s.id = o.structure_id JOIN series se ON se.id = o.series_id GROUP BY o.root_id, se.modality
), files AS (
    SELECT f.root_id, se.modality, count(*) AS files, sum(f.size)::bigint AS bytes
    FROM (SELECT file_id, min(image_id) AS image_id FROM location GROUP BY file_id) AS o JOIN file f ON f.id = o.file_id
    JOIN image i ON i.id = o.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
    GROUP BY f.root_id, se.modality
)
SELECT r.name AS root, k.modality, count(DISTINCT k.patient_id) AS patients, count(DISTINCT k.study_id) AS studies,
       count(DISTINCT k.series_id) AS series, sum(k.images)::bigint AS images, z.sizes, sum(k.annotated)::bigint AS annotated,
       coalesce(sum(k.annotations), 0)::bigint AS annotations, t.structures, sum(k.not_present)::bigint AS not_present, f.files, f.bytes
FROM known k JOIN root r ON r.id = k.root_id JOIN sizes z ON z.root_id = k.root_id AND z.modality = k.modality
LEFT JOIN structures t ON t.root_id = k.root_id AND t.modality = k.modality
LEFT JOIN files f ON f.root_id = k.root_id AND f.modality = k.modality
GROUP BY r.id, r.name, k.modality, z.sizes, t.structures, f.files, f.bytes
ORDER BY r.name, k.modality;

COMMENT ON VIEW inventory IS 'What is there. One row a storage place and modality: how many patients, images and annotations, and how much of it cannot be read now.';

COMMENT ON COLUMN inventory.root IS 'Name of the storage place.';

COMMENT ON COLUMN inventory.modality IS 'Modality (0008,0060).';

COMMENT ON COLUMN inventory.patients IS 'Patients of whom it holds images.';

COMMENT ON COLUMN inventory.studies IS 'Their studies.';

COMMENT ON COLUMN inventory.series IS 'Their series.';

COMMENT ON COLUMN inventory.images IS '2-D frames.';

COMMENT ON COLUMN inventory.sizes IS 'Rows × columns in px, the most frequent first.';

COMMENT ON COLUMN inventory.annotated IS 'Images with an accepted current annotation.';

COMMENT ON COLUMN inventory.annotations IS 'Accepted current annotations on these images.';

COMMENT ON COLUMN inventory.structures IS 'What was drawn on them.';

COMMENT ON COLUMN inventory.not_present IS 'Images of which no file is present there.';

COMMENT ON COLUMN inventory.files IS 'Files that hold these images.';

COMMENT ON COLUMN inventory.bytes IS 'Their size together, as catalogued.';

CREATE VIEW open_flags AS
SELECT g.id AS flag_id, g.rule, g.rule_version, g.severity,
       CASE WHEN g.file_id IS NOT NULL THEN 'file' WHEN g.image_id IS NOT NULL THEN 'image' WHEN g.annotation_id IS NOT NULL THEN 'annotation'
            WHEN g.pairing_id IS NOT NULL THEN 'pairing' WHEN g.series_id IS NOT NULL THEN 'series' WHEN g.study_id IS NOT NULL THEN 'study'
            ELSE 'patient' END AS subject,
       coalesce(g.file_id, g.image_id, g.annotation_id, g.pairing_id, g.series_id, g.study_id, g.patient_id) AS subject_id,
       g.value, g.detail, g.revokes, g.raised_by, g.raised_at, g.assigned_to
FROM flag g WHERE g.state = 'open'
ORDER BY array_position(ARRAY['error', 'warning', 'info'], g.severity), g.rule, g.id;

COMMENT ON VIEW open_flags IS 'Findings that nobody has answered. One row an open flag. Those of severity error keep what they speak of out of feeding; those that revoke do so at once.';

COMMENT ON COLUMN open_flags.flag_id IS 'The flag, as `catalog flag show` takes it.';

COMMENT ON COLUMN open_flags.rule IS 'Code of the rule that raised it.';

COMMENT ON COLUMN open_flags.rule_version IS 'Version of that rule.';

COMMENT ON COLUMN open_flags.severity IS 'error, warning or info.';

COMMENT ON COLUMN open_flags.subject IS 'file, image, annotation, pairing, series, study or patient.';

COMMENT ON COLUMN open_flags.subject_id IS 'Its id there.';

COMMENT ON COLUMN open_flags.value IS 'What was measured.';

COMMENT ON COLUMN open_flags.detail IS 'What was found, in words.';

COMMENT ON COLUMN open_flags.revokes IS 'Is nothing of it fed, not from frozen streams either?';

COMMENT ON COLUMN open_flags.raised_by IS 'Who raised it.';

COMMENT ON COLUMN open_flags.raised_at IS 'When.';

COMMENT ON COLUMN open_flags.assigned_to IS 'Who looks after it.';

CREATE VIEW orphans AS
SELECT 'a study without series' AS what, 'study' AS subject, st.id AS subject_id
FROM study st WHERE NOT EXISTS (SELECT FROM series se WHERE se.study_id = st.id)
UNION ALL
SELECT 'a series without objects', 'series', se.id FROM series se WHERE NOT EXISTS (SELECT FROM instance n WHERE n.series_id = se.id)
UNION ALL
SELECT 'an object of several frames without images', 'instance', n.id
FROM instance n WHERE n.number_of_frames > 0 AND NOT EXISTS (SELECT FROM image i WHERE i.instance_id = n.id)
UNION ALL
SELECT 'a frame that its object does not have', 'image', i.id
FROM image i JOIN instance n ON n.id = i.instance_id WHERE i.frame >= n.number_of_frames
UNION ALL
SELECT 'an image with a present file and no preferred location', 'image', l.image_id
FROM location l JOIN file f ON f.id = l.file_id GROUP BY l.image_id HAVING bool_or(f.state = 'present') AND NOT bool_or(l.preferred)
UNION ALL
SELECT 'an accepted pairing without a mask, and no flag says why', 'pairing', p.id
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current AND a.kind <> 'label'
LEFT JOIN mask m ON m.pairing_id = p.id
WHERE p.state = 'accepted' AND m.pairing_id IS NULL
  AND NOT EXISTS (SELECT FROM flag g WHERE g.pairing_id = p.id) AND NOT EXISTS (SELECT FROM flag g WHERE g.annotation_id = a.id)
UNION ALL
SELECT 'a mask whose grid is not that of its image', 'pairing', p.id
FROM mask m JOIN pairing p ON p.id = m.pairing_id JOIN image i ON i.id = p.image_id
WHERE p.state = 'accepted' AND (m.rows, m.columns) IS DISTINCT FROM (i.rows, i.columns)
UNION ALL
SELECT 'a mask with bits set behind its last pixel', 'pairing', m.pairing_id
FROM mask m WHERE length(m.bits) > 0
  AND get_byte(m.bits, length(m.bits) - 1) & ((1 << (8 * length(m.bits) - m.box_rows * m.box_columns)) - 1) <> 0
UNION ALL
SELECT 'a shape that is not that of its mask', 'pairing', h.pairing_id
FROM shape h LEFT JOIN mask m ON m.pairing_id = h.pairing_id
WHERE m.pairing_id IS NULL OR h.largest_px > m.area_px OR (m.area_px > 0) <> (h.components > 0)
   OR (h.components = 1 AND h.largest_px <> m.area_px)
UNION ALL
SELECT 'two current versions of one annotation', 'annotation', max(a.id)
FROM annotation a WHERE a.current GROUP BY a.file_id, a.source_key HAVING count(*) > 1
UNION ALL
SELECT 'a closed flag that nobody closed', 'flag', g.id FROM flag g WHERE g.state <> 'open' AND coalesce(g.closed_by, '') = ''
UNION ALL
SELECT 'an order that is not whole', 'epoch', e.id
FROM epoch e LEFT JOIN (SELECT epoch_id, sum(cardinality(sample_ids)) AS stored FROM epoch_order GROUP BY epoch_id) o ON o.epoch_id = e.id
WHERE e.order_sha256 IS NOT NULL AND e.pruned_at IS NULL AND coalesce(o.stored, 0) <> e.num_samples
ORDER BY what, subject_id;

COMMENT ON VIEW orphans IS 'Rows that contradict each other: must be empty. What no constraint forbids and no command of scanfeed leaves behind: somebody wrote to the database by other ways, or there is a bug in scanfeed. Either way the rows named here cannot be trusted.';

COMMENT ON COLUMN orphans.what IS 'What is wrong, in words.';

COMMENT ON COLUMN orphans.subject IS 'Table of the row.';

COMMENT ON COLUMN orphans.subject_id IS 'Its id there.';

CREATE VIEW pairing_provenance AS
SELECT p.id AS pairing_id, a.id AS annotation_id, s.name AS structure, r.name AS reader, f.path, p.image_id AS sample_id, p.method, p.rule,
       p.score, p.state, p.actor, p.actor NOT LIKE 'layout:%' AS by_person, p.at, coalesce(e.decisions, 0) AS decisions
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id JOIN file f ON f.id = a.file_id
LEFT JOIN (SELECT subject_id, count(*) AS decisions FROM event WHERE subject = 'pairing' GROUP BY subject_id) e ON e.subject_id = p.id
ORDER BY p.id;

COMMENT ON VIEW pairing_provenance IS 'Why an annotation belongs to its image. One row a pairing of a current annotation: how it was found, by which rule in words, how sure that is, and who decided.';

COMMENT ON COLUMN pairing_provenance.pairing_id IS 'The pairing.';

COMMENT ON COLUMN pairing_provenance.annotation_id IS 'What was drawn.';

COMMENT ON COLUMN pairing_provenance.structure IS 'Its structure.';

COMMENT ON COLUMN pairing_provenance.reader IS 'Who drew it.';

COMMENT ON COLUMN pairing_provenance.path IS 'File of the annotation, in its root.';

COMMENT ON COLUMN pairing_provenance.sample_id IS 'On which image.';

COMMENT ON COLUMN pairing_provenance.method IS 'How it was found.';

COMMENT ON COLUMN pairing_provenance.rule IS 'The rule in words, with what it matched.';

COMMENT ON COLUMN pairing_provenance.score IS 'How sure, 0 to 1.';

COMMENT ON COLUMN pairing_provenance.state IS 'proposed, accepted or rejected.';

COMMENT ON COLUMN pairing_provenance.actor IS 'Who decided.';

COMMENT ON COLUMN pairing_provenance.by_person IS 'Was it a person, and no layout?';

COMMENT ON COLUMN pairing_provenance.at IS 'When.';

COMMENT ON COLUMN pairing_provenance.decisions IS 'Rows of the event log about this pairing.';

CREATE VIEW reader_agreement AS
SELECT pt.patient_id AS patient, p.image_id AS sample_id, s.name AS structure, r.name AS reader, o.name AS other_reader,
       a.id AS annotation_id, b.id AS other_id, m.area_px, w.area_px AS other_px, c.pixels AS both_px,
       round(2.0 * c.pixels / nullif(m.area_px + w.area_px, 0), 6)::float8 AS dice
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask m ON m.pairing_id = p.id
JOIN pairing q ON q.image_id = p.image_id AND q.state = 'accepted' AND q.id > p.id
JOIN annotation b ON b.id = q.annotation_id AND b.current AND b.structure_id = a.structure_id AND b.reader_id <> a.reader_id
JOIN mask w ON w.pairing_id = q.id
LEFT JOIN overlap c ON c.pairing_id = p.id AND c.other_id = q.id AND c.kind = 'image'
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id JOIN reader o ON o.id = b.reader_id
JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
WHERE p.state = 'accepted'
ORDER BY dice NULLS FIRST, p.image_id, a.id, b.id;

COMMENT ON VIEW reader_agreement IS 'How far two readers agree. One row two accepted current annotations of one structure on one image by different readers. Dice is twice the pixels that both have, over the pixels of the one and of the other: 1 for equal masks, 0 for masks that have no pixel in common.';

COMMENT ON COLUMN reader_agreement.patient IS 'PatientID, or the layout''s name for the patient.';

COMMENT ON COLUMN reader_agreement.sample_id IS 'The image.';

COMMENT ON COLUMN reader_agreement.structure IS 'What both drew.';

COMMENT ON COLUMN reader_agreement.reader IS 'The one.';

COMMENT ON COLUMN reader_agreement.other_reader IS 'The other.';

COMMENT ON COLUMN reader_agreement.annotation_id IS 'What the one drew.';

COMMENT ON COLUMN reader_agreement.other_id IS 'What the other drew.';

COMMENT ON COLUMN reader_agreement.area_px IS 'Pixels of the one''s mask.';

COMMENT ON COLUMN reader_agreement.other_px IS 'Pixels of the other''s.';

COMMENT ON COLUMN reader_agreement.both_px IS 'Pixels that are in both; NULL: not computed yet, which `catalog qa run` does.';

COMMENT ON COLUMN reader_agreement.dice IS '2 × both / (one + other); NULL if both are empty, or not computed yet.';

CREATE VIEW rule_runs AS
SELECT DISTINCT ON (q.rule) q.rule, q.rule_version, u.id AS qa_run, u.started_at AS at, u.actor, u.changed_only, q.findings, q.raised,
       q.closed, q.not_evaluated, q.why,
       (SELECT string_agg(s.name || ' ' || s.value, ', ' ORDER BY s.name) FROM rule_setting s WHERE s.rule = q.rule) AS settings
FROM qa_result q JOIN qa_run u ON u.id = q.qa_run_id
ORDER BY q.rule, u.id DESC;

COMMENT ON VIEW rule_runs IS 'What each rule found when it last ran. One row a rule of `catalog qa run`: when it last ran, what it found, and what it could not look at. A rule that is not here never ran; one that left subjects out says nothing about these.';

COMMENT ON COLUMN rule_runs.rule IS 'Code of the rule.';

COMMENT ON COLUMN rule_runs.rule_version IS 'Its version then.';

COMMENT ON COLUMN rule_runs.qa_run IS 'The run.';

COMMENT ON COLUMN rule_runs.at IS 'When that run began.';

COMMENT ON COLUMN rule_runs.actor IS 'Who ran it.';

COMMENT ON COLUMN rule_runs.changed_only IS 'Did it look only at patients of whom something had changed?';

COMMENT ON COLUMN rule_runs.findings IS 'Subjects that failed.';

COMMENT ON COLUMN rule_runs.raised IS 'Flags that it raised.';

COMMENT ON COLUMN rule_runs.closed IS 'Flags that closed themselves.';

COMMENT ON COLUMN rule_runs.not_evaluated IS 'Subjects that it could not look at.';

COMMENT ON COLUMN rule_runs.why IS 'Why not.';

COMMENT ON COLUMN rule_runs.settings IS 'Parameters that are not at their defaults now.';

CREATE VIEW run_exposure AS
WITH given AS (
    SELECT epoch_id, range_agg(positions) AS positions FROM ledger WHERE outcome = 'delivered' GROUP BY epoch_id
), seen AS (
    SELECT e.run_id, e.id AS epoch_id, e.started_at, st.patient_id, s.sample_id
    FROM epoch e JOIN given g ON g.epoch_id = e.id JOIN epoch_order o ON o.epoch_id = e.id
    CROSS JOIN LATERAL unnest(o.sample_ids) WITH ORDINALITY AS s (sample_id, n)
    LEFT JOIN image i ON i.id = s.sample_id LEFT JOIN instance n ON n.id = i.instance_id
    LEFT JOIN series se ON se.id = n.series_id LEFT JOIN study st ON st.id = se.study_id
    WHERE e.pruned_at IS NULL AND o.part * 1024 + s.n - 1 <@ g.positions
    UNION ALL
    SELECT e.run_id, e.id, e.started_at, pt.id, NULL FROM epoch e CROSS JOIN unnest(e.patients) AS pt (id) WHERE e.pruned_at IS NOT NULL
), revoked AS (
    SELECT DISTINCT st.patient_id FROM revoked_image v JOIN image i ON i.id = v.sample_id JOIN instance n ON n.id = i.instance_id
    JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
)
SELECT r.name AS run, pt.patient_id AS patient, count(DISTINCT s.sample_id) AS samples, count(DISTINCT s.epoch_id) AS epochs,
       min(s.started_at) AS first_at, max(s.started_at) AS last_at, bool_or(v.patient_id IS NOT NULL) AS revoked,
       (SELECT string_agg(DISTINCT encode(k.model_sha256, 'hex'), ', ') FROM run_note k WHERE k.run_id = r.id) AS models
FROM seen s JOIN run r ON r.id = s.run_id LEFT JOIN patient pt ON pt.id = s.patient_id LEFT JOIN revoked v ON v.patient_id = s.patient_id
GROUP BY r.id, r.name, pt.patient_id
ORDER BY r.name, pt.patient_id;

COMMENT ON VIEW run_exposure IS 'Which patients a training saw. One row a training and patient: of how many samples pixels were delivered, in how many epochs, and which models came of it. Of pruned epochs the patients are known and the samples no more.';

COMMENT ON COLUMN run_exposure.run IS 'The training.';

COMMENT ON COLUMN run_exposure.patient IS 'PatientID, or the layout''s name for the patient; NULL: the images were taken out since.';

COMMENT ON COLUMN run_exposure.samples IS 'Different images delivered, in epochs that are not pruned.';

COMMENT ON COLUMN run_exposure.epochs IS 'Epochs in which some of them were.';

COMMENT ON COLUMN run_exposure.first_at IS 'When the first of these epochs began.';

COMMENT ON COLUMN run_exposure.last_at IS 'When the last of them began.';

COMMENT ON COLUMN run_exposure.revoked IS 'Is something of the patient revoked now?';

COMMENT ON COLUMN run_exposure.models IS 'sha256 of models that this training made.';

CREATE VIEW runs_and_errors AS
SELECT i.id AS run, r.name AS root, i.layout, i.state, i.program_version, i.host, i.started_at, i.finished_at, i.undone_at, i.files_seen,
       i.files_read, e.stage, e.code, count(e.id) AS errors
FROM ingest_run i JOIN root r ON r.id = i.root_id LEFT JOIN ingest_error e ON e.ingest_run_id = i.id
GROUP BY i.id, r.name, e.stage, e.code
ORDER BY i.id, e.stage, e.code;

COMMENT ON VIEW runs_and_errors IS 'Ingests, and what they could not take in. One row an ingest and kind of error, one row alone for an ingest without errors. A run that says running and whose host does nothing was killed; the next one goes on where it ended.';

COMMENT ON COLUMN runs_and_errors.run IS 'Its number, as `catalog runs show` takes it.';

COMMENT ON COLUMN runs_and_errors.root IS 'Name of the storage place.';

COMMENT ON COLUMN runs_and_errors.layout IS 'How images and annotations were found and paired.';

COMMENT ON COLUMN runs_and_errors.state IS 'running, finished, interrupted or failed.';

COMMENT ON COLUMN runs_and_errors.program_version IS 'Version of scanfeed.';

COMMENT ON COLUMN runs_and_errors.host IS 'Machine that read the files.';

COMMENT ON COLUMN runs_and_errors.started_at IS 'When it began.';

COMMENT ON COLUMN runs_and_errors.finished_at IS 'When it ended.';

COMMENT ON COLUMN runs_and_errors.undone_at IS 'When what it brought was taken out again.';

COMMENT ON COLUMN runs_and_errors.files_seen IS 'Files of the layout found.';

COMMENT ON COLUMN runs_and_errors.files_read IS 'Files new or changed, and therefore read.';

COMMENT ON COLUMN runs_and_errors.stage IS 'find, read, pair or mask; NULL: no error.';

COMMENT ON COLUMN runs_and_errors.code IS 'Short stable name of the error.';

COMMENT ON COLUMN runs_and_errors.errors IS 'How many of them.';

CREATE VIEW unpaired AS
SELECT a.id AS annotation_id, ro.name AS root, f.path, a.source_key, s.name AS structure, r.name AS reader,
       coalesce(p.proposed, 0) AS proposed, coalesce(p.rejected, 0) AS rejected, g.why
FROM annotation a JOIN file f ON f.id = a.file_id JOIN root ro ON ro.id = f.root_id
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id
LEFT JOIN (
    SELECT annotation_id, count(*) FILTER (WHERE state = 'proposed') AS proposed, count(*) FILTER (WHERE state = 'rejected') AS rejected,
           bool_or(state = 'accepted') AS accepted
    FROM pairing GROUP BY annotation_id
) p ON p.annotation_id = a.id
LEFT JOIN (
    SELECT annotation_id, string_agg(rule || ': ' || detail, '; ' ORDER BY id) AS why
    FROM flag WHERE state = 'open' AND annotation_id IS NOT NULL GROUP BY annotation_id
) g ON g.annotation_id = a.id
WHERE a.current AND NOT coalesce(p.accepted, false)
ORDER BY a.id;

COMMENT ON VIEW unpaired IS 'Annotations without an image. Current annotations of which nobody said for good on which image they were drawn: they are not fed.';

COMMENT ON COLUMN unpaired.annotation_id IS 'The annotation.';

COMMENT ON COLUMN unpaired.root IS 'Storage place of its file.';

COMMENT ON COLUMN unpaired.path IS 'Its file there.';

COMMENT ON COLUMN unpaired.source_key IS 'Which annotation in the file; empty when it holds one.';

COMMENT ON COLUMN unpaired.structure IS 'What was drawn.';

COMMENT ON COLUMN unpaired.reader IS 'Who drew it.';

COMMENT ON COLUMN unpaired.proposed IS 'Pairings that wait for a decision (`catalog pair list`).';

COMMENT ON COLUMN unpaired.rejected IS 'Pairings that were rejected.';

COMMENT ON COLUMN unpaired.why IS 'What its open flags say.';

CREATE VIEW unrecorded_changes AS
WITH last AS (
    SELECT DISTINCT ON (subject, subject_id) subject, subject_id, id, action, after FROM event
    WHERE subject IN ('flag', 'pairing', 'annotation') ORDER BY subject, subject_id, id DESC
), since AS (
    SELECT subject, min(subject_id) AS first FROM event WHERE action = 'insert' GROUP BY subject
), now AS (
    SELECT 'flag' AS subject, id, jsonb_build_object('rule', rule, 'severity', severity, 'state', state, 'revokes', revokes) AS found FROM flag
    UNION ALL SELECT 'pairing', id, jsonb_build_object('annotation', annotation_id, 'image', image_id, 'state', state, 'method', method)
    FROM pairing
    UNION ALL SELECT 'annotation', id, jsonb_build_object('file', file_id, 'version', version, 'current', current, 'shift_x', shift_x,
                                                          'shift_y', shift_y, 'sha256', encode(content_hash, 'hex'))
    FROM annotation
)
SELECT n.subject, n.id AS subject_id, l.id AS last_event, coalesce(l.after, '{}') AS recorded, n.found
FROM now n LEFT JOIN last l ON l.subject = n.subject AND l.subject_id = n.id LEFT JOIN since s ON s.subject = n.subject
WHERE l.action = 'delete' OR (l.id IS NULL AND n.id >= s.first) OR NOT l.after @> n.found
UNION ALL
SELECT l.subject, l.subject_id, l.id, l.after, NULL
FROM last l LEFT JOIN now n ON n.subject = l.subject AND n.id = l.subject_id WHERE l.action <> 'delete' AND n.id IS NULL
ORDER BY subject, subject_id;

COMMENT ON VIEW unrecorded_changes IS 'Decisions that the event log does not know: must be empty. One row a flag, pairing or annotation that is not what its last event says, or that came in without one: somebody changed it while the triggers of the log were off.';

COMMENT ON COLUMN unrecorded_changes.subject IS 'flag, pairing or annotation.';

COMMENT ON COLUMN unrecorded_changes.subject_id IS 'Its id there.';

COMMENT ON COLUMN unrecorded_changes.last_event IS 'The last event about it; NULL: there is none.';

COMMENT ON COLUMN unrecorded_changes.recorded IS 'What that event says.';

COMMENT ON COLUMN unrecorded_changes.found IS 'What the row says.';
