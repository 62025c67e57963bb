-- title: The same pixels under two patients
-- severity: error
-- subject: image
-- version: 1
-- scope: all
-- means: Images of two patients have exactly the same pixels, and they are not empty. One person is here under two names, or a file was filed
--   under the wrong patient. A split by patient would put the same image into training and testing.
-- do: Find out whose image it is; take the other copy out, or bring both under one patient.
WITH twice AS (
    SELECT pixel_hash FROM image WHERE pixel_hash IS NOT NULL GROUP BY pixel_hash HAVING count(*) > 1
), alike AS (
    SELECT i.id, i.pixel_hash, i.rows, i.columns, st.patient_id AS patient
    FROM twice JOIN image i USING (pixel_hash) JOIN location l ON l.image_id = i.id AND l.preferred
    JOIN measure m ON m.image_id = i.id AND m.minimum < m.maximum
    JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
), groups AS (
    SELECT pixel_hash, rows, columns, count(DISTINCT patient) AS patients, min(ARRAY[patient, id]) AS a, max(ARRAY[patient, -id]) AS b
    FROM alike GROUP BY 1, 2, 3 HAVING min(patient) < max(patient)
)
SELECT x.id AS subject_id, g.patients::float8 AS value,
       format('the same pixels are there under %s patients, such as sample %s', g.patients, CASE WHEN g.a[1] <> x.patient THEN g.a[2] ELSE -g.b[2] END)
           AS detail
FROM alike x JOIN groups g ON g.pixel_hash = x.pixel_hash AND (g.rows, g.columns) = (x.rows, x.columns)

-- not evaluated
SELECT count(*), 'images not measured; run `catalog measure`' FROM image i JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.pixel_hash IS NULL OR NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id)
