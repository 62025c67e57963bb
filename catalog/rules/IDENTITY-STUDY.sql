-- title: One study under two patients
-- severity: error
-- subject: study
-- version: 1
-- scope: all
-- means: Images of two patients have the same StudyInstanceUID. A study is of one patient: either one person has two PatientIDs here, and a
--   split by patient would put one part into training and the other into testing, or images were filed under the wrong patient.
-- do: Find out which PatientID is right, and correct it (in the files, or in the layout that names patients). Withdrawing consent of one
--   of the two would not act on the other.
WITH twice AS (
    SELECT study_instance_uid FROM study WHERE study_instance_uid <> '' GROUP BY 1 HAVING count(*) > 1
), there AS (
    SELECT st.id, st.study_instance_uid, st.patient_id FROM study st JOIN twice USING (study_instance_uid)
    WHERE EXISTS (SELECT FROM series se JOIN instance n ON n.series_id = se.id JOIN image i ON i.instance_id = n.id
                  JOIN location l ON l.image_id = i.id AND l.preferred WHERE se.study_id = st.id)
), counted AS (
    SELECT study_instance_uid, count(DISTINCT patient_id) AS patients FROM there GROUP BY 1
)
SELECT t.id AS subject_id, c.patients::float8 AS value, format('its StudyInstanceUID (0020,000D) is there under %s patients', c.patients) AS detail
FROM there t JOIN counted c USING (study_instance_uid) WHERE c.patients > 1

-- not evaluated
SELECT count(*), 'studies without a UID' FROM study WHERE study_instance_uid = ''
