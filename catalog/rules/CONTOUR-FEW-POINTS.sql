-- title: Contour of fewer than three different points
-- severity: error
-- subject: pairing
-- version: 1
-- means: A closed ring of the contour has fewer different points than an area needs, so that ring adds nothing to the mask. Where the mask
--   is empty nothing can be learned from it (error); where other rings make one, a part of what was drawn may be missing (warning).
-- do: Look at the file: a click, or a contour that was begun and not finished. Delete it there, or draw it again.
-- parameter least: 3 different points that each ring must have
SELECT p.id AS subject_id, h.smallest_ring::float8 AS value,
       format('a ring has %s different points; an area needs at least %s', h.smallest_ring, :least) AS detail,
       CASE WHEN m.area_px = 0 THEN 'error' ELSE 'warning' END AS severity
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id
WHERE h.smallest_ring < :least
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
