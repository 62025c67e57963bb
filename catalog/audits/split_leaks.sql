-- title: Pixels on two sides of a split
-- means: Images whose pixels a patient on another side of the split has too. The database refuses such a split; these came in later, with
--   an ingest or when hashes were measured. They are fed to no part of the split until one of them is gone.
-- must be empty: yes
-- column split: Its name.
-- column sample_id: The image.
-- column patient: Its patient.
-- column part: Its part.
-- column fold: And fold.
-- column other_sample_id: An image (of several the first) of the same pixels on another side.
-- column other_part: Its part.
-- column other_fold: And fold.
WITH held AS (
    SELECT i.id AS sample_id, i.pixel_hash, a.split_id, a.patient_id, a.part, a.fold,
           bool_or(m.image_id IS NOT NULL) OVER (PARTITION BY i.pixel_hash) AS blank
    FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    JOIN split_patient a ON a.patient_id = st.patient_id
    LEFT JOIN measure m ON m.image_id = i.id AND m.minimum = m.maximum
    WHERE i.pixel_hash IN (
        SELECT i.pixel_hash FROM image i JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
        JOIN study st ON st.id = se.study_id WHERE i.pixel_hash IS NOT NULL
        GROUP BY i.pixel_hash HAVING min(st.patient_id) <> max(st.patient_id))
), sides AS (
    SELECT split_id, pixel_hash, part, fold, min(sample_id) AS sample_id FROM held WHERE NOT blank GROUP BY split_id, pixel_hash, part, fold
)
SELECT DISTINCT ON (s.name, h.sample_id) s.name AS split, h.sample_id, pt.patient_id AS patient, h.part, h.fold,
       o.sample_id AS other_sample_id, o.part AS other_part, o.fold AS other_fold
FROM held h JOIN sides o ON (o.split_id, o.pixel_hash) = (h.split_id, h.pixel_hash) AND (o.part, o.fold) IS DISTINCT FROM (h.part, h.fold)
JOIN split s ON s.id = h.split_id JOIN patient pt ON pt.id = h.patient_id
ORDER BY s.name, h.sample_id, o.sample_id
