-- title: Decisions that the event log does not know
-- means: One row a flag, pairing or annotation that is not what its last event says, or that came in without one: somebody changed it
--   while the triggers of the log were off.
-- must be empty: yes
-- column subject: flag, pairing or annotation.
-- column subject_id: Its id there.
-- column last_event: The last event about it; NULL: there is none.
-- column recorded: What that event says.
-- column found: What the row says.
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
ORDER BY subject, subject_id
