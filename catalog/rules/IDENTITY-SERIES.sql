-- title: One series under two patients or studies
-- severity: error
-- subject: series
-- version: 1
-- scope: all
-- means: Images of two patients have the same SeriesInstanceUID: one person has two PatientIDs here, or images were filed under the wrong
--   patient. Both sides of a split by patient could hold the same person. In two studies of one patient it is a warning.
-- do: Find out which PatientID or study is right, and correct it (in the files, or in the layout that names patients).
WITH twice AS (
    SELECT series_instance_uid FROM series WHERE series_instance_uid <> '' GROUP BY 1 HAVING count(*) > 1
), there AS (
    SELECT se.id, se.series_instance_uid, se.study_id, st.patient_id
    FROM series se JOIN twice USING (series_instance_uid) JOIN study st ON st.id = se.study_id
    WHERE EXISTS (SELECT FROM instance n JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id AND l.preferred
                  WHERE n.series_id = se.id)
), counted AS (
    SELECT series_instance_uid, count(*) AS studies, count(DISTINCT patient_id) AS patients FROM there GROUP BY 1
)
SELECT t.id AS subject_id, c.studies::float8 AS value,
       format('its SeriesInstanceUID (0020,000E) is there in %s studies of %s patients', c.studies, c.patients) AS detail,
       CASE WHEN c.patients > 1 THEN 'error' ELSE 'warning' END AS severity
FROM there t JOIN counted c USING (series_instance_uid) WHERE c.studies > 1

-- not evaluated
SELECT count(*), 'series without a UID' FROM series WHERE series_instance_uid = ''
