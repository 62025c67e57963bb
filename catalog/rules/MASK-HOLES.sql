-- title: Mask with holes
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The mask encloses background. A contour of several rings may have one hole less than rings. Another one has holes where it crosses
--   itself (warning), or where a channel leads to them, as structure sets write holes (info). In a segment a hole may be right, as the
--   blood pool is inside the muscle, or a slip of the brush (info).
-- do: Look at it (`catalog show`). For structures that enclose something else, name them in `usual` (`catalog qa set`).
-- parameter most: 0 holes that may be there beyond those that a contour's rings make
-- parameter usual: none names of structures that may have holes, with | between them
SELECT p.id AS subject_id, h.holes::float8 AS value,
       format('%s hole%s; %s', h.holes, CASE h.holes WHEN 1 THEN '' ELSE 's' END,
              CASE WHEN a.kind <> 'polygon' THEN 'a segment'
                   ELSE format('the contour has %s ring(s) and crosses itself %s times', cardinality(a.rings), h.self_crossings) END) AS detail,
       CASE WHEN h.self_crossings > 0 THEN 'warning' ELSE 'info' END AS severity
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred JOIN file at ON at.id = l.file_id AND at.state = 'present'
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN shape h ON h.pairing_id = p.id JOIN structure s ON s.id = a.structure_id
WHERE h.holes > 0 AND h.holes > :most + greatest(coalesce(cardinality(a.rings), 1) - 1, 0)
  AND s.name <> ALL (string_to_array(:usual::text, '|'))
-- not evaluated
SELECT count(*), 'masks without a shape yet; `catalog qa run` without --dry-run makes them'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.pairing_id IS NULL
