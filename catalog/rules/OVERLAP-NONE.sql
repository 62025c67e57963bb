-- title: Nothing in common with the neighbouring slice
-- severity: error
-- subject: pairing
-- version: 1
-- means: Seen along the slice normal, no pixel of a structure lies in its mask on the next slice (same phase). Neighbours go by
--   position. Of two, the one that agrees with fewer of its own neighbours is flagged; both, where that does not tell. A thin
--   structure that runs aslant may do so, which is a warning: the gap between the two outlines is no wider than the slices lie apart.
-- do: Look at both (`catalog show`): one lies on the wrong image, or outlines something else.
-- parameter apart_mm: 15 mm from slice to slice beyond which they are no neighbours
WITH pair AS MATERIALIZED (
    SELECT o.pairing_id, o.other_id, o.apart, o.pixels,
           sqrt(greatest(0, (h.centroid[1] - k.centroid[1]) ^ 2 + (h.centroid[2] - k.centroid[2]) ^ 2
                            + (h.centroid[3] - k.centroid[3]) ^ 2 - o.apart ^ 2))
           - (sqrt(m.area_px) + sqrt(om.area_px)) * sqrt(i.row_spacing * i.column_spacing / pi()) AS gap
    FROM scope c -- overlap holds current annotations and accepted pairings alone
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id
    JOIN overlap o ON o.pairing_id = p.id AND o.kind = 'slice' AND o.apart <= :apart_mm
    JOIN mask m ON m.pairing_id = o.pairing_id JOIN mask om ON om.pairing_id = o.other_id
    LEFT JOIN shape h ON h.pairing_id = o.pairing_id LEFT JOIN shape k ON k.pairing_id = o.other_id
    WHERE m.area_px > 0 AND om.area_px > 0
), side AS MATERIALIZED (
    SELECT pairing_id AS id, other_id AS other, apart, gap FROM pair WHERE pixels = 0
    UNION ALL
    SELECT other_id, pairing_id, apart, gap FROM pair WHERE pixels = 0
), disagrees AS (
    SELECT s.id, s.against * 2 - count(*) AS by
    FROM (SELECT id, count(*) AS against FROM side GROUP BY id) s
    JOIN (SELECT pairing_id AS id FROM pair UNION ALL SELECT other_id FROM pair) every USING (id) GROUP BY s.id, s.against
)
SELECT DISTINCT ON (s.id) s.id AS subject_id, s.gap AS value,
       format('no pixel in common with the next slice''s mask (annotation %s, sample %s), %s mm off%s', q.annotation_id, q.image_id,
              round(s.apart::numeric, 1), '; about ' || round(s.gap::numeric, 1) || ' mm between their outlines') AS detail,
       CASE WHEN s.gap <= s.apart THEN 'warning' ELSE 'error' END AS severity
FROM side s JOIN disagrees d USING (id) JOIN disagrees e ON e.id = s.other JOIN pairing q ON q.id = s.other
WHERE d.by >= e.by
ORDER BY s.id, s.gap DESC NULLS LAST, s.other
-- not evaluated
SELECT count(*), 'contours without the same structure and reader on a neighbouring slice of the same phase'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE NOT EXISTS (SELECT FROM overlap o WHERE o.pairing_id = p.id AND o.kind = 'slice')
  AND NOT EXISTS (SELECT FROM overlap o WHERE o.other_id = p.id AND o.kind = 'slice')
