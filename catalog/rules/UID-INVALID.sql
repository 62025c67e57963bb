-- title: UIDs that break PS3.5 9.1
-- severity: info
-- subject: series
-- version: 1
-- means: A UID is numbers with dots between them, none with a zero in front, 64 characters at most (PS3.5 9.1). These are not: a program
--   made them up, as many de-identifications do. The catalog keeps and matches them as they are, so nothing is wrong with the images.
-- do: Nothing here. Other programs may refuse such files or rewrite the UIDs, and then no longer find what refers to them.
WITH here AS (
    SELECT n.series_id, n.sop_instance_uid AS uid FROM scope c JOIN instance n ON n.series_id = c.series_id AND n.sop_class_uid <> ''
    JOIN image i ON i.instance_id = n.id AND i.frame = 0 JOIN location l ON l.image_id = i.id AND l.preferred
    UNION ALL
    SELECT n.series_id, n.sop_instance_uid FROM scope c JOIN instance n ON n.series_id = c.series_id AND n.sop_class_uid <> ''
    WHERE EXISTS (SELECT FROM file f WHERE f.instance_id = n.id AND f.state = 'present')
), named AS (
    SELECT series_id, 3 AS level, uid, count(*) OVER (PARTITION BY series_id) AS objects FROM here
    UNION ALL
    SELECT se.id, v.level, v.uid, 0 FROM series se JOIN study st ON st.id = se.study_id
    CROSS JOIN LATERAL (VALUES (1, st.study_instance_uid), (2, se.series_instance_uid)) v (level, uid)
    WHERE se.id IN (SELECT series_id FROM here)
), bad AS (
    SELECT series_id, max(objects) AS objects, count(*) AS uids, count(*) FILTER (WHERE level = 3) AS of_objects,
           array_to_string(ARRAY[
               CASE WHEN bool_or(level = 1) THEN 'the StudyInstanceUID' END, CASE WHEN bool_or(level = 2) THEN 'the SeriesInstanceUID' END,
               CASE WHEN bool_or(level = 3)
                    THEN format('%s of %s SOPInstanceUIDs', count(*) FILTER (WHERE level = 3), max(objects)) END], ', ') AS which,
           count(*) FILTER (WHERE uid ~ '(^|[.])0[0-9]') AS zeros, count(*) FILTER (WHERE uid ~ '[^0-9.]') AS characters,
           count(*) FILTER (WHERE uid ~ '^[.]|[.][.]|[.]$') AS components, count(*) FILTER (WHERE length(uid) > 64) AS long,
           count(*) FILTER (WHERE uid = '') AS missing
    FROM named WHERE length(uid) > 64 OR uid !~ '^(0|[1-9][0-9]*)([.](0|[1-9][0-9]*))*$' GROUP BY series_id
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
