-- title: Centre jumps between neighbouring slices or phases
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The centre of a structure lies further beside its centre on the next slice (same phase) or in the next phase (same slice) than
--   a heart moves or bends from one to the next. Neighbours go by position and trigger time. Of two that differ, the one that
--   agrees with fewer of its own neighbours is flagged; both, where that does not tell.
-- do: Look at both (`catalog show`): one lies on the wrong image, or outlines something else.
-- parameter furthest_mm: 8 mm that centres may differ by, wherever the images lie
-- parameter per_mm: 0.8 mm more that they may differ by for each mm from slice to slice
-- parameter per_ms: 0.06 mm more that they may differ by for each ms from phase to phase
-- parameter radii: 0.5 share of the larger radius that they may differ by in any case; large structures move further
-- parameter apart_mm: 25 mm from slice to slice beyond which they are no neighbours
WITH pair AS MATERIALIZED (
    SELECT o.pairing_id, o.other_id, o.kind, o.apart,
           sqrt(greatest(0, (h.centroid[1] - k.centroid[1]) ^ 2 + (h.centroid[2] - k.centroid[2]) ^ 2 + (h.centroid[3] - k.centroid[3]) ^ 2
               - CASE o.kind WHEN 'slice' THEN o.apart ^ 2 ELSE 0 END)) AS jump,
           greatest(:furthest_mm + o.apart * CASE o.kind WHEN 'slice' THEN :per_mm ELSE :per_ms END,
                    :radii * sqrt(greatest(m.area_px, om.area_px) * i.row_spacing * i.column_spacing / pi())) AS most
    FROM scope c -- overlap holds current annotations and accepted pairings alone
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id
    JOIN overlap o ON o.pairing_id = p.id AND (o.kind = 'phase' OR o.kind = 'slice' AND o.apart <= :apart_mm)
    JOIN shape h ON h.pairing_id = o.pairing_id JOIN shape k ON k.pairing_id = o.other_id
    JOIN mask m ON m.pairing_id = o.pairing_id JOIN mask om ON om.pairing_id = o.other_id
    WHERE h.centroid IS NOT NULL AND k.centroid IS NOT NULL
), side AS MATERIALIZED (
    SELECT pairing_id AS id, other_id AS other, kind, apart, jump, most FROM pair WHERE jump > most
    UNION ALL
    SELECT other_id, pairing_id, kind, apart, jump, most FROM pair WHERE jump > most
), disagrees AS (
    SELECT s.id, s.against * 2 - count(*) AS by
    FROM (SELECT id, count(*) AS against FROM side GROUP BY id) s
    JOIN (SELECT pairing_id AS id FROM pair UNION ALL SELECT other_id FROM pair) every USING (id) GROUP BY s.id, s.against
)
SELECT DISTINCT ON (s.id) s.id AS subject_id, s.jump AS value,
       format('its centre lies %s mm beside that %s (annotation %s, sample %s), %s off; up to %s mm is usual', round(s.jump::numeric, 1),
              CASE s.kind WHEN 'slice' THEN 'on the next slice' ELSE 'in the next phase' END, q.annotation_id, q.image_id,
              round(s.apart::numeric, 1) || CASE s.kind WHEN 'slice' THEN ' mm' ELSE ' ms' END, round(s.most::numeric, 1)) AS detail
FROM side s JOIN disagrees d USING (id) JOIN disagrees e ON e.id = s.other JOIN pairing q ON q.id = s.other
WHERE d.by >= e.by
ORDER BY s.id, s.jump / nullif(s.most, 0) DESC, s.other
-- not evaluated
SELECT count(*), 'contours without a place in space, or without the same structure and reader on a neighbouring slice or phase'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.centroid IS NULL
   OR NOT EXISTS (SELECT FROM overlap o WHERE o.pairing_id = p.id AND o.kind <> 'image')
   AND NOT EXISTS (SELECT FROM overlap o WHERE o.other_id = p.id AND o.kind <> 'image')
