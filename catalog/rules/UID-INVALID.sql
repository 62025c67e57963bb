-- title: UIDs that break PS3.5 9.1
-- severity: info
-- subject: series
-- version: 1
-- means: A UID is numbers with dots between them, none with a zero in front, 64 characters at most (PS3.5 9.1). These are not: a program
--   made them up, as many de-identifications do. The catalog keeps and matches them as they are, so nothing is wrong with the images.
-- do: Nothing here. Other programs may refuse such files or rewrite the UIDs, and then no longer find what refers to them.
WITH suspect AS MATERIALIZED (
    SELECT n.id, n.series_id, 3 AS level, n.sop_instance_uid AS uid FROM scope c
    JOIN instance n ON n.series_id = c.series_id AND n.sop_class_uid <> ''
    WHERE n.sop_instance_uid !~ '^(0|[1-9][0-9]*)([.](0|[1-9][0-9]*))*$' OR length(n.sop_instance_uid) > 64
    UNION ALL
    -- Of study and series, once for each of its objects.
    SELECT n.id, n.series_id, v.level, v.uid FROM scope c JOIN series se ON se.id = c.series_id JOIN study st ON st.id = se.study_id
    CROSS JOIN LATERAL (VALUES (1, st.study_instance_uid), (2, se.series_instance_uid)) v (level, uid)
    JOIN instance n ON n.series_id = c.series_id AND n.sop_class_uid <> ''
    WHERE v.uid !~ '^(0|[1-9][0-9]*)([.](0|[1-9][0-9]*))*$' OR length(v.uid) > 64
), present AS (
    SELECT s.* FROM suspect s
    JOIN image i ON i.instance_id = s.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT s.* FROM suspect s WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = s.id AND f.state = 'present')
), wrong AS (
    SELECT series_id, level, uid FROM present WHERE level = 3
    UNION ALL
    SELECT DISTINCT series_id, level, uid FROM present WHERE level < 3
), counted AS (
    SELECT series_id, count(*) AS objects FROM instance WHERE sop_class_uid <> '' AND series_id IN (SELECT series_id FROM wrong) GROUP BY 1
), bad AS (
    SELECT w.series_id, count(*) AS uids,
           array_to_string(ARRAY[
               CASE WHEN bool_or(level = 1) THEN 'the StudyInstanceUID' END, CASE WHEN bool_or(level = 2) THEN 'the SeriesInstanceUID' END,
               CASE WHEN bool_or(level = 3)
                    THEN format('%s of %s SOPInstanceUIDs', count(*) FILTER (WHERE level = 3), max(t.objects)) END], ', ') AS which,
           count(*) FILTER (WHERE uid ~ '(^|[.])0[0-9]') AS zeros, count(*) FILTER (WHERE uid ~ '[^0-9.]') AS characters,
           count(*) FILTER (WHERE uid ~ '^[.]|[.][.]|[.]$') AS components, count(*) FILTER (WHERE length(uid) > 64) AS long,
           count(*) FILTER (WHERE uid = '') AS missing
    FROM wrong w JOIN counted t ON t.series_id = w.series_id GROUP BY w.series_id
)
SELECT series_id AS subject_id, uids::float8 AS value,
       format('%s: %s', which, array_to_string(ARRAY[
           CASE WHEN zeros > 0 THEN format('%s with a zero in front of a component', zeros) END,
           CASE WHEN characters > 0 THEN format('%s with characters other than digits and dots', characters) END,
           CASE WHEN components > 0 THEN format('%s with an empty component', components) END,
           CASE WHEN long > 0 THEN format('%s longer than 64 characters', long) END,
           CASE WHEN missing > 0 THEN format('%s missing', missing) END], ', ')) AS detail
FROM bad
-- not evaluated
SELECT count(*), 'objects of files that are no DICOM, or do not say their class' FROM scope c JOIN instance n ON n.series_id = c.series_id
WHERE n.sop_class_uid = ''
