-- title: The same pixels twice in one patient
-- severity: warning
-- subject: image
-- version: 1
-- means: Two images of one patient have exactly the same pixels, under different UIDs, and they are not empty. The copy gives that image
--   twice its weight, and a contour may lie on one and not on the other. (A file that was stored again under the same UID is one image.)
--   Frames of one object that repeat each other are an info.
-- do: Take one copy out, or the series that holds it. If a phase was filled with its neighbour, ask for the original.
WITH known AS (
    SELECT i.id, i.pixel_hash, i.rows, i.columns, i.instance_id, c.patient_id AS patient
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    WHERE i.pixel_hash IS NOT NULL
), groups AS (
    SELECT patient, pixel_hash, rows, columns, count(*) AS images, min(instance_id) < max(instance_id) AS apart, min(id) AS first, max(id) AS last
    FROM known GROUP BY 1, 2, 3, 4 HAVING count(*) > 1
)
SELECT k.id AS subject_id, g.images::float8 AS value,
       format('%s images of the patient have these pixels, such as sample %s', g.images, CASE WHEN g.first = k.id THEN g.last ELSE g.first END) AS detail,
       CASE WHEN g.apart THEN 'warning' ELSE 'info' END AS severity
FROM groups g JOIN known k USING (patient, pixel_hash, rows, columns)
JOIN measure m ON m.image_id = k.id AND m.minimum < m.maximum

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.pixel_hash IS NULL OR NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
