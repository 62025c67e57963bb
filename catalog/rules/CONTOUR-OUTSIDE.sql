-- title: Contour leaves its image
-- severity: warning
-- subject: pairing
-- version: 1
-- means: Points of the contour lie outside the image's pixels, beyond the outer edge of the outermost ones. What lies outside is cut off
--   from the mask. Where it is much, the contour was drawn on an image of another size, or in other coordinates.
-- do: Look at it (`catalog show`). A point or two just outside may be right where the anatomy leaves the picture.
-- parameter most: 0 points that may lie outside
SELECT p.id AS subject_id, h.points_outside::float8 AS value,
       format('%s of its %s points lie outside the image''s %s×%s px', h.points_outside, h.points, i.rows, i.columns) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN shape h ON h.pairing_id = p.id
WHERE h.points_outside > :most
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
