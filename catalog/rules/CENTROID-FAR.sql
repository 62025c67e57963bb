-- title: Centre far from the others of its series
-- severity: warning
-- subject: pairing
-- version: 1
-- means: Seen along the slice normal, the centre of a structure lies far from the middle (median) of the centres of all contours of the
--   same structure and reader in its series, further than the structure leans across the stack.
-- do: Look at it (`catalog show`): it lies on the wrong image, or outlines something else.
-- parameter furthest_mm: 40 mm from the median of the centres
-- parameter radii: 2 times the median radius, if that is further; for large structures
-- parameter at_least: 4 contours in the series, or nothing is said
WITH drawn AS MATERIALIZED (
    SELECT p.id, n.series_id, a.structure_id, a.reader_id, i.image_orientation AS axes,
           h.centroid[1] * i.image_orientation[1] + h.centroid[2] * i.image_orientation[2] + h.centroid[3] * i.image_orientation[3] AS x,
           h.centroid[1] * i.image_orientation[4] + h.centroid[2] * i.image_orientation[5] + h.centroid[3] * i.image_orientation[6] AS y,
           sqrt(m.area_px * i.row_spacing * i.column_spacing / pi()) AS radius
    FROM scope c
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
    JOIN mask m ON m.pairing_id = p.id JOIN shape h ON h.pairing_id = p.id
    WHERE h.centroid IS NOT NULL
), middle AS (
    SELECT series_id, structure_id, reader_id, axes, count(*) AS count, percentile_cont(0.5) WITHIN GROUP (ORDER BY x) AS x,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY y) AS y, percentile_cont(0.5) WITHIN GROUP (ORDER BY radius) AS radius
    FROM drawn GROUP BY series_id, structure_id, reader_id, axes
)
SELECT d.id AS subject_id, sqrt((d.x - g.x) ^ 2 + (d.y - g.y) ^ 2) AS value,
       format('its centre lies %s mm from the median of the %s contours of %s in the series; up to %s mm is usual',
              round(sqrt((d.x - g.x) ^ 2 + (d.y - g.y) ^ 2)::numeric, 1), g.count, s.name,
              round(greatest(:furthest_mm, :radii * g.radius)::numeric, 1)) AS detail
FROM drawn d JOIN middle g USING (series_id, structure_id, reader_id, axes) JOIN structure s ON s.id = d.structure_id
WHERE g.count >= :at_least AND (d.x - g.x) ^ 2 + (d.y - g.y) ^ 2 > greatest(:furthest_mm, :radii * g.radius) ^ 2
-- not evaluated
SELECT count(*), 'contours whose image does not say where it lies'
FROM scope c
JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
JOIN mask m ON m.pairing_id = p.id LEFT JOIN shape h ON h.pairing_id = p.id
WHERE h.centroid IS NULL
