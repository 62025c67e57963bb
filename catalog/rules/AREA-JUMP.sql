-- title: Size jumps between neighbouring slices or phases
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The radius of a structure (that of a disc of its area) differs more from that on the next slice (same phase) or in the next
--   phase (same slice) than a heart narrows or contracts from one to the next. Radii are compared, not areas: towards the apex areas
--   shrink to a fraction within a slice, and that is right. Neighbours go by position and trigger time. Of two that differ, the one
--   that agrees with fewer of its own neighbours is flagged; both, where that does not tell.
-- do: Look at both (`catalog show`): one lies on the wrong image, or outlines something else.
-- parameter least_mm: 3 mm that radii may differ by, wherever the images lie
-- parameter per_mm: 0.9 mm more that they may differ by for each mm from slice to slice
-- parameter per_ms: 0.06 mm more that they may differ by for each ms from phase to phase
-- parameter apart_mm: 25 mm from slice to slice beyond which they are no neighbours
WITH pair AS MATERIALIZED (
    SELECT o.pairing_id, o.other_id, o.kind, o.apart, sqrt(m.area_px * i.row_spacing * i.column_spacing / pi()) AS radius,
           sqrt(om.area_px * i.row_spacing * i.column_spacing / pi()) AS other_radius,
           :least_mm + o.apart * CASE o.kind WHEN 'slice' THEN :per_mm ELSE :per_ms END AS most
    FROM scope c -- overlap holds current annotations and accepted pairings alone
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id
    JOIN overlap o ON o.pairing_id = p.id AND (o.kind = 'phase' OR o.kind = 'slice' AND o.apart <= :apart_mm)
    JOIN mask m ON m.pairing_id = o.pairing_id JOIN mask om ON om.pairing_id = o.other_id
    WHERE i.row_spacing IS NOT NULL AND i.column_spacing IS NOT NULL AND m.area_px > 0 AND om.area_px > 0
), side AS MATERIALIZED (
    SELECT pairing_id AS id, other_id AS other, kind, apart, radius, other_radius, abs(radius - other_radius) AS jump, most FROM pair
    WHERE abs(radius - other_radius) > most
    UNION ALL
    SELECT other_id, pairing_id, kind, apart, other_radius, radius, abs(radius - other_radius), most FROM pair
    WHERE abs(radius - other_radius) > most
), disagrees AS (
    SELECT s.id, s.against * 2 - count(*) AS by
    FROM (SELECT id, count(*) AS against FROM side GROUP BY id) s
    JOIN (SELECT pairing_id AS id FROM pair UNION ALL SELECT other_id FROM pair) every USING (id) GROUP BY s.id, s.against
)
SELECT DISTINCT ON (s.id) s.id AS subject_id, s.jump AS value,
       format('its radius is %s mm, %s (annotation %s, sample %s, %s off) %s mm; up to %s mm of difference is usual',
              round(s.radius::numeric, 1), CASE s.kind WHEN 'slice' THEN 'on the next slice' ELSE 'in the next phase' END,
              q.annotation_id, q.image_id, round(s.apart::numeric, 1) || CASE s.kind WHEN 'slice' THEN ' mm' ELSE ' ms' END,
              round(s.other_radius::numeric, 1), round(s.most::numeric, 1)) AS detail
FROM side s JOIN disagrees d USING (id) JOIN disagrees e ON e.id = s.other JOIN pairing q ON q.id = s.other
WHERE d.by >= e.by
ORDER BY s.id, s.jump / nullif(s.most, 0) DESC, s.other
-- not evaluated
SELECT count(*), 'contours without pixel spacing, or without the same structure and reader on a neighbouring slice or phase'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE i.row_spacing IS NULL OR i.column_spacing IS NULL
   OR NOT EXISTS (SELECT FROM overlap o WHERE o.pairing_id = p.id AND o.kind <> 'image')
   AND NOT EXISTS (SELECT FROM overlap o WHERE o.other_id = p.id AND o.kind <> 'image')
