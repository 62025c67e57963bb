-- title: Inner structure not inside the one around it
-- severity: error
-- subject: pairing
-- version: 1
-- means: On one image, a structure that lies inside another one (`catalog qa relate`) has pixels outside it: more of them than two
--   careful readings of one border differ by. One of the two contours is wrong, or lies on the wrong image.
-- do: Look at both (`catalog show`), and reject or correct the wrong one.
-- parameter slack: 0.02 share of the inner mask that may lie outside; right contours have up to 0.002
SELECT p.id AS subject_id, o.pixels::float8 / m.area_px AS value,
       format('%s of the %s px of %s lie outside %s (annotation %s, %s px): %s %% of it is inside', m.area_px - o.pixels, m.area_px,
              s.name, os.name, op.annotation_id, om.area_px, round(100.0 * o.pixels / m.area_px, 1)) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN overlap o ON o.pairing_id = p.id AND o.kind = 'image' JOIN mask m ON m.pairing_id = p.id
JOIN pairing op ON op.id = o.other_id AND op.state = 'accepted' JOIN annotation oa ON oa.id = op.annotation_id AND oa.current
JOIN mask om ON om.pairing_id = op.id
JOIN structure s ON s.id = a.structure_id JOIN structure os ON os.id = oa.structure_id
JOIN relation r ON r.inside = s.name AND r.outside = os.name AND oa.reader_id = a.reader_id
WHERE m.area_px > 0 AND m.area_px - o.pixels > :slack * m.area_px
