-- title: Annotation of one patient on an image of another
-- severity: error
-- subject: pairing
-- version: 1
-- means: The annotation's source names another patient than the image's. Sources that do are a structure set or segmentation with its own
--   PatientID (0010,0020), and a path with the name under which a list knows the patient. Where the source names the image by its UID
--   the image is right and one of the two PatientIDs was changed, as by de-identification: a warning.
-- do: Find out which is right; reject the pairing (`catalog pair reject`) if the image is not the annotation's.
SELECT p.id AS subject_id, NULL::float8 AS value,
       CASE WHEN ap.id IS NOT NULL AND ap.id <> st.patient_id THEN 'its file has another PatientID (0010,0020) than the image'
            ELSE 'its source names another patient than the image''s' END || '; paired by ' || p.method AS detail,
       CASE p.method WHEN 'uid' THEN 'warning' ELSE 'error' END AS severity
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN study st ON st.id = c.study_id JOIN patient ip ON ip.id = st.patient_id
JOIN file f ON f.id = a.file_id
LEFT JOIN instance fn ON fn.id = f.instance_id LEFT JOIN series fs ON fs.id = fn.series_id LEFT JOIN study ft ON ft.id = fs.study_id
LEFT JOIN patient ap ON ap.id = ft.patient_id AND ap.patient_id <> ''
WHERE ap.id <> st.patient_id OR a.refers_to ->> 'original_id' <> ip.original_id
-- not evaluated
SELECT count(*), 'annotations whose source names no patient'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN study st ON st.id = c.study_id JOIN patient ip ON ip.id = st.patient_id
JOIN file f ON f.id = a.file_id
LEFT JOIN instance fn ON fn.id = f.instance_id LEFT JOIN series fs ON fs.id = fn.series_id LEFT JOIN study ft ON ft.id = fs.study_id
LEFT JOIN patient ap ON ap.id = ft.patient_id AND ap.patient_id <> ''
WHERE a.origin NOT IN ('interpolated', 'proposed') AND ap.id IS NULL AND (a.refers_to ->> 'original_id' IS NULL OR ip.original_id IS NULL)
