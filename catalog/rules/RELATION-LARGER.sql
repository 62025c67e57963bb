-- title: Inner structure larger than the one around it
-- severity: error
-- subject: pairing
-- version: 1
-- means: On one image, the mask of a structure that lies inside another one (table relation) has more pixels than that other one.
--   One of the two is wrong, or their names are exchanged.
-- do: Look at both (`catalog show`), and reject or correct the wrong one.
SELECT p.id AS subject_id, m.area_px::float8 / nullif(om.area_px, 0) AS value,
       format('%s has %s px, %s has %s px', s.name, m.area_px, os.name, om.area_px) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN structure s ON s.id = a.structure_id JOIN mask m ON m.pairing_id = p.id
JOIN relation r ON r.inside = s.name
JOIN structure os ON os.name = r.outside
JOIN annotation oa ON oa.structure_id = os.id AND oa.current AND oa.reader_id = a.reader_id
JOIN pairing op ON op.annotation_id = oa.id AND op.image_id = i.id AND op.state = 'accepted'
JOIN mask om ON om.pairing_id = op.id
WHERE m.area_px > om.area_px
