-- title: Pixels on two sides of a split
-- means: Images whose pixels a patient on another side of the split has too. The database refuses such a split; these came in later, with
--   an ingest or when hashes were measured. They are fed to no part of the split until one of them is gone.
-- must be empty: yes
-- column split: Its name.
-- column sample_id: The image.
-- column patient: Its patient.
-- column part: Its part.
-- column fold: And fold.
-- column other_sample_id: An image of the same pixels on another side.
-- column other_part: Its part.
-- column other_fold: And fold.
SELECT s.name AS split, i.id AS sample_id, pt.patient_id AS patient, a.part, a.fold, j.id AS other_sample_id, b.part AS other_part,
       b.fold AS other_fold
FROM image i JOIN image j ON j.pixel_hash = i.pixel_hash AND j.id <> i.id
JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
JOIN instance o ON o.id = j.instance_id JOIN series sf ON sf.id = o.series_id JOIN study su ON su.id = sf.study_id
JOIN split_patient a ON a.patient_id = st.patient_id
JOIN split_patient b ON b.split_id = a.split_id AND b.patient_id = su.patient_id
JOIN split s ON s.id = a.split_id JOIN patient pt ON pt.id = st.patient_id
WHERE (a.part, a.fold) IS DISTINCT FROM (b.part, b.fold)
  AND NOT EXISTS (SELECT FROM measure m WHERE m.image_id = i.id AND m.minimum = m.maximum)
ORDER BY s.name, i.id, j.id
