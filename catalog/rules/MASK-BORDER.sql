-- title: Mask touches the image's border
-- severity: info
-- subject: pairing
-- version: 1
-- means: The mask has pixels in the image's first or last row or column: what was drawn may go on outside the picture, so that its area is
--   too small; or it lies in the wrong place.
-- do: Nothing where the anatomy leaves the picture; else look at it (`catalog show`).
-- parameter most_px: 0 px that may lie in the outermost rows and columns
SELECT p.id AS subject_id, h.border_px::float8 AS value,
       format('%s of its %s px lie in the outermost rows or columns of the image', h.border_px, m.area_px) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id
WHERE h.border_px > :most_px
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
