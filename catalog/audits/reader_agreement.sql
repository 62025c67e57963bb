-- title: How far two readers agree
-- means: One row two accepted current annotations of one structure on one image by different readers. Dice is twice the pixels that both
--   have, over the pixels of the one and of the other: 1 for equal masks, 0 for masks that have no pixel in common.
-- must be empty: no
-- column patient: PatientID, or the layout's name for the patient.
-- column sample_id: The image.
-- column structure: What both drew.
-- column reader: The one.
-- column other_reader: The other.
-- column annotation_id: What the one drew.
-- column other_id: What the other drew.
-- column area_px: Pixels of the one's mask.
-- column other_px: Pixels of the other's.
-- column both_px: Pixels that are in both; NULL: not computed yet, which `catalog qa run` does.
-- column dice: 2 × both / (one + other); NULL if both are empty, or not computed yet.
SELECT pt.patient_id AS patient, p.image_id AS sample_id, s.name AS structure, r.name AS reader, o.name AS other_reader,
       a.id AS annotation_id, b.id AS other_id, m.area_px, w.area_px AS other_px, c.pixels AS both_px,
       round(2.0 * c.pixels / nullif(m.area_px + w.area_px, 0), 6)::float8 AS dice
FROM pairing p JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN mask m ON m.pairing_id = p.id
JOIN pairing q ON q.image_id = p.image_id AND q.state = 'accepted' AND q.id > p.id
JOIN annotation b ON b.id = q.annotation_id AND b.current AND b.structure_id = a.structure_id AND b.reader_id <> a.reader_id
JOIN mask w ON w.pairing_id = q.id
LEFT JOIN overlap c ON c.pairing_id = p.id AND c.other_id = q.id AND c.kind = 'image'
JOIN structure s ON s.id = a.structure_id JOIN reader r ON r.id = a.reader_id JOIN reader o ON o.id = b.reader_id
JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id
JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
WHERE p.state = 'accepted'
ORDER BY dice NULLS FIRST, p.image_id, a.id, b.id
