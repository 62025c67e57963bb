-- title: File that is not there any more
-- severity: warning
-- subject: file
-- version: 1
-- scope: all
-- means: The file was below its root at an earlier ingest and was not at the last one. An image that lies nowhere else is not fed; what
--   was drawn in a missing contour file is not, either. It is an info where each of the file's images is read from another file.
-- do: If it was deleted on purpose, call it a false positive: it stays closed. Else bring it back and ingest again: the flag closes
--   itself. A file that was only moved within its root is recognised and not flagged.
WITH missing AS MATERIALIZED (SELECT id FROM file WHERE state = 'missing' AND format <> 'none'),
held AS (
    SELECT l.file_id, count(*) AS images, count(*) FILTER (WHERE p.image_id IS NULL) AS lost
    FROM missing m JOIN location l ON l.file_id = m.id LEFT JOIN location p ON p.image_id = l.image_id AND p.preferred GROUP BY 1
), drawn AS (
    SELECT a.file_id, count(DISTINCT a.source_key) AS annotations FROM missing m JOIN annotation a ON a.file_id = m.id GROUP BY 1
)
SELECT m.id AS subject_id, (coalesce(h.lost, 0) + coalesce(d.annotations, 0))::float8 AS value,
       CASE WHEN h.lost > 0 THEN format('%s of its %s image(s) can be read nowhere else', h.lost, h.images)
            WHEN h.images > 0 THEN format('its %s image(s) are read from other files', h.images)
            WHEN d.annotations > 0 THEN format('it held %s annotation(s)', d.annotations)
            ELSE 'it held no image and no annotation' END AS detail,
       CASE WHEN h.lost > 0 OR d.annotations > 0 THEN 'warning' ELSE 'info' END AS severity
FROM missing m LEFT JOIN held h ON h.file_id = m.id LEFT JOIN drawn d ON d.file_id = m.id
