-- title: Labels that nobody drew
-- means: What was interpolated between drawn labels, or proposed from intensities, and from what. It is fed only where it is asked for.
-- must be empty: no
-- column annotation_id: The derived annotation.
-- column sample_id: Its image.
-- column patient: The patient.
-- column structure: What it shows.
-- column origin: interpolated or proposed.
-- column method: How it was made.
-- column along: slices or phases; NULL: proposed.
-- column gap: From the first parent to the second: mm, or ms.
-- column fraction: Where between them it lies, 0 to 1.
-- column first_id: Annotation that it was made from.
-- column second_id: The other one.
-- column state: accepted, proposed or rejected; rejected too if a parent was.
-- column current: Is it the newest version?
-- column area_px: Pixels in the mask.
-- column actor: Who asked for it.
-- column at: When.
SELECT d.annotation_id, p.image_id AS sample_id, pt.patient_id AS patient, s.name AS structure, a.origin, d.method, d.along, d.gap,
       d.fraction, d.first_id, d.second_id, p.state, a.current, m.area_px, d.actor, d.at
FROM derivation d JOIN annotation a ON a.id = d.annotation_id JOIN structure s ON s.id = a.structure_id
JOIN pairing p ON p.annotation_id = a.id JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id
JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id JOIN patient pt ON pt.id = st.patient_id
LEFT JOIN mask m ON m.pairing_id = p.id
ORDER BY d.annotation_id
