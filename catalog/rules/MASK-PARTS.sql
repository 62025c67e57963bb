-- title: Mask of several parts
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The mask falls apart into pieces that touch by no pixel's edge. A contour of one ring should not: it crosses itself, or is thinner
--   than a pixel somewhere (warning). A segment may be of several parts, as lungs or vessels are; specks beside it are slips (info).
-- do: Look at it (`catalog show`). For structures that come in parts, name them in `usual` (`catalog qa set`).
-- parameter most_px: 0 px that may lie outside the largest part
-- parameter usual: none names of structures that may be of several parts, with | between them
SELECT p.id AS subject_id, (m.area_px - h.largest_px)::float8 AS value,
       format('%s parts; %s of its %s px lie outside the largest', h.components, m.area_px - h.largest_px, m.area_px) AS detail,
       CASE a.kind WHEN 'polygon' THEN 'warning' ELSE 'info' END AS severity
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id JOIN structure s ON s.id = a.structure_id
-- A contour of several rings is meant to be of as many parts.
WHERE h.components > 1 AND h.components > coalesce(cardinality(a.rings), 1) AND m.area_px - h.largest_px > :most_px
  AND s.name <> ALL (string_to_array(:usual::text, '|'))
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
