-- title: One of two structures drawn without the other
-- severity: info
-- subject: pairing
-- version: 1
-- means: Of two structures of which one lies inside the other, this image has one only, though the reader drew both elsewhere in the
--   series. Often that is meant: many readers draw the outer border at end diastole only.
-- do: Nothing, if it is meant. A training that needs both takes `Feed(structures=[…], require="all")`.
WITH related AS (
    SELECT inside AS name, outside AS other FROM relation UNION SELECT outside, inside FROM relation
), drawn AS MATERIALIZED (
    SELECT p.id, p.image_id, n.series_id, a.reader_id, a.structure_id
    FROM scope c
    JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN pairing p ON p.image_id = i.id AND p.state = 'accepted' JOIN annotation a ON a.id = p.annotation_id AND a.current
    JOIN structure s ON s.id = a.structure_id
    WHERE s.name IN (SELECT name FROM related)
), has AS (
    SELECT DISTINCT series_id, reader_id, structure_id FROM drawn
)
SELECT DISTINCT ON (d.id) d.id AS subject_id, NULL::float8 AS value,
       format('%s without %s on this image; the reader drew both in this series', s.name, t.name) AS detail
FROM drawn d JOIN structure s ON s.id = d.structure_id JOIN related r ON r.name = s.name JOIN structure t ON t.name = r.other
JOIN has h ON h.series_id = d.series_id AND h.reader_id = d.reader_id AND h.structure_id = t.id
LEFT JOIN drawn e ON e.image_id = d.image_id AND e.reader_id = d.reader_id AND e.structure_id = t.id
WHERE e.id IS NULL
ORDER BY d.id, t.name
