-- title: Larger or smaller than both of its neighbours
-- severity: warning
-- subject: pairing
-- version: 1
-- means: The radius of a structure (that of a disc of its area) lies well outside those on the slices before and after it (same phase),
--   or of the phases before and after it (same slice). It is compared with its neighbours alone, so that small contours near the apex,
--   where radii fall from slice to slice, are none of these.
-- do: Look at it and its neighbours (`catalog show`, `catalog plot areas`).
-- parameter least_mm: 3 mm beyond both of its neighbours' radii
-- parameter share: 0.15 of their mean radius beyond both, if that is more
-- parameter apart_mm: 25 mm from slice to slice beyond which they are no neighbours
WITH pair AS MATERIALIZED (
    SELECT o.pairing_id, o.other_id, o.kind, sqrt(m.area_px * i.row_spacing * i.column_spacing / pi()) AS radius,
           sqrt(om.area_px * i.row_spacing * i.column_spacing / pi()) AS other_radius
    FROM scope c -- overlap holds current annotations and accepted pairings alone
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id JOIN pairing p ON p.image_id = i.id
    JOIN overlap o ON o.pairing_id = p.id AND (o.kind = 'phase' OR o.kind = 'slice' AND o.apart <= :apart_mm)
    JOIN mask m ON m.pairing_id = o.pairing_id JOIN mask om ON om.pairing_id = o.other_id
    WHERE i.row_spacing IS NOT NULL AND i.column_spacing IS NOT NULL AND m.area_px > 0 AND om.area_px > 0
), between_two AS (
    SELECT b.pairing_id AS id, b.kind, b.radius, least(a.radius, b.other_radius) AS least, greatest(a.radius, b.other_radius) AS most,
           greatest(:least_mm, :share * (a.radius + b.other_radius) / 2) AS margin
    FROM pair a JOIN pair b ON b.pairing_id = a.other_id AND b.kind = a.kind
)
SELECT DISTINCT ON (id) id AS subject_id, CASE WHEN radius > most THEN radius - most ELSE radius - least END AS value,
       format('its radius is %s mm, those of %s before and after it %s and %s mm; up to %s mm beyond is usual', round(radius::numeric, 1),
              CASE kind WHEN 'slice' THEN 'the slices' ELSE 'the phases' END, round(least::numeric, 1), round(most::numeric, 1),
              round(margin::numeric, 1)) AS detail
FROM between_two
WHERE radius - most > margin OR least - radius > margin
ORDER BY id, greatest(radius - most, least - radius) DESC, kind
-- not evaluated
SELECT count(*), 'contours that are not between two others of the same structure and reader, or without pixel spacing'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id
WHERE i.row_spacing IS NULL OR i.column_spacing IS NULL OR NOT EXISTS (
    SELECT FROM overlap o JOIN overlap q ON q.pairing_id = o.other_id AND q.kind = o.kind WHERE o.other_id = p.id AND o.kind <> 'image')
