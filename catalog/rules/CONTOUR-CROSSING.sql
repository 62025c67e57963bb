-- title: Contour crosses itself
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The contour's outline runs across itself, so that what is inside is not certain: what it encloses twice is no part of the mask
--   (even-odd). Touching itself or running back along itself is not counted.
-- do: Look at it (`catalog show`). A small loop where the reader set the pen down again hardly changes the mask; a figure of eight, or
--   points in a wrong order, do.
-- parameter most: 0 crossings that may be there
SELECT p.id AS subject_id, h.self_crossings::float8 AS value,
       format('it crosses itself %s; the mask has %s px, the contour encloses %s px²',
              CASE WHEN h.self_crossings >= 100 THEN '100 times or more' WHEN h.self_crossings = 1 THEN 'once'
                   ELSE h.self_crossings || ' times' END, m.area_px, round(h.polygon_area_px::numeric)) AS detail
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id
WHERE h.self_crossings > :most
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
UNION ALL
SELECT count(*), 'contours of too many points to compare all edges'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN shape h ON h.pairing_id = p.id
WHERE h.points IS NOT NULL AND h.self_crossings IS NULL
