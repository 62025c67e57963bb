-- title: Contours follow the edges best when moved
-- severity: warning
-- subject: series
-- version: 2
-- scope: all
-- means: Moved by one and the same shift, the contours of a root, structure and reader follow the edges of their images clearly better
--   than as they were read. Their coordinates are counted from another origin: from 1 instead of 0 gives a shift of -1 px in x and y,
--   from a pixel's corner instead of its centre half a pixel. How well they follow is the mean gradient along the contour, in
--   standard deviations over the 81 shifts that were tried (-2 to 2 px).
-- do: Look at some (`catalog gallery`). If it is so: `catalog annotations shift --root NAME --structure S --by X,Y -m WHY`, then
--   `catalog measure`; `--undo` takes it back.
-- parameter at_least: 12 contours, or nothing is said
-- parameter gain: 0.25 standard deviations that the best shift must be better by, on average
-- parameter sigmas: 5 standard errors of that mean that it must be better by
-- parameter most: 1000 contours, about, of each root, structure and reader that are looked at
WITH drawn AS MATERIALIZED (
    SELECT e.pairing_id, n.series_id, f.root_id, a.structure_id, a.reader_id, a.shift_x, a.shift_y
    FROM edge_fit e JOIN pairing p ON p.id = e.pairing_id AND p.state = 'accepted'
    JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN file f ON f.id = a.file_id
    JOIN image i ON i.id = p.image_id JOIN instance n ON n.id = i.instance_id
), sources AS MATERIALIZED (
    SELECT root_id, structure_id, reader_id, shift_x, shift_y, count(*) AS count, row_number() OVER () AS source
    FROM drawn GROUP BY 1, 2, 3, 4, 5
), mean AS MATERIALIZED (
    -- About :most of each, always the same ones: to sort hundreds of thousands for that took seconds.
    SELECT o.source, u.at, count(*) AS count, avg(u.score::float8) AS score, avg(u.score::float8 - e.scores[41]) AS gain,
           stddev_samp(u.score::float8 - e.scores[41]) / sqrt(count(*)) AS error
    FROM drawn d JOIN sources o USING (root_id, structure_id, reader_id, shift_x, shift_y)
    JOIN edge_fit e USING (pairing_id) CROSS JOIN LATERAL unnest(e.scores) WITH ORDINALITY AS u (score, at)
    WHERE o.count <= :most OR (hashint8extended(d.pairing_id, 0) & 4294967295) < 4294967296 * (:most / o.count)
    GROUP BY o.source, u.at
), best AS (
    SELECT DISTINCT ON (source) *, ((at - 1) % 9 - 4) / 2.0::float8 AS x, ((at - 1) / 9 - 4) / 2.0::float8 AS y
    FROM mean ORDER BY source, score DESC, at
), curve AS (
    SELECT source, string_agg(round(score::numeric, 1)::text, ' ' ORDER BY at) FILTER (WHERE (at - 1) % 10 = 0) AS diagonal,
           string_agg(round(score::numeric, 1)::text, ' ' ORDER BY at) FILTER (WHERE (at - 1) / 9 = 4) AS along_x,
           string_agg(round(score::numeric, 1)::text, ' ' ORDER BY at) FILTER (WHERE (at - 1) % 9 = 4) AS along_y
    FROM mean GROUP BY source
), shifted AS (
    SELECT b.source, sqrt(b.x ^ 2 + b.y ^ 2) AS off,
           format('%s of root %s: best when moved by (%s, %s) px from where they were read%s, over %s contours %s ± %s better than now. '
                  'Scores at -2, -1.5, … 2 px on the diagonal x = y: %s; in x: %s; in y: %s',
                  s.name, r.name, d.shift_x + b.x, d.shift_y + b.y,
                  CASE WHEN (d.shift_x, d.shift_y) <> (0, 0) THEN format(' (now by (%s, %s))', d.shift_x, d.shift_y) END, b.count,
                  round(b.gain::numeric, 2), round(b.error::numeric, 2), c.diagonal, c.along_x, c.along_y) AS words
    FROM best b JOIN curve c USING (source) JOIN sources d USING (source)
    JOIN structure s ON s.id = d.structure_id JOIN root r ON r.id = d.root_id
    WHERE b.at <> 41 AND b.count >= :at_least AND b.gain >= :gain AND b.gain >= :sigmas * b.error
)
SELECT o.series_id AS subject_id, max(s.off) AS value, string_agg(s.words, '. ' ORDER BY s.words) AS detail
FROM shifted s JOIN (
    SELECT DISTINCT source, series_id FROM drawn JOIN sources USING (root_id, structure_id, reader_id, shift_x, shift_y)
) o USING (source) GROUP BY o.series_id
-- not evaluated
SELECT count(*), 'contours whose edges were not measured; run `catalog measure`'
FROM annotation a JOIN pairing p ON p.annotation_id = a.id AND p.state = 'accepted'
WHERE a.current AND a.kind = 'polygon' AND NOT EXISTS (SELECT FROM edge_fit e WHERE e.pairing_id = p.id)
UNION ALL
SELECT coalesce(sum(count), 0), 'contours of a root, structure and reader that has too few of them' FROM (
    SELECT count(*) FROM edge_fit e JOIN pairing p ON p.id = e.pairing_id AND p.state = 'accepted'
    JOIN annotation a ON a.id = p.annotation_id AND a.current JOIN file f ON f.id = a.file_id
    GROUP BY f.root_id, a.structure_id, a.reader_id, a.shift_x, a.shift_y HAVING count(*) < :at_least) AS few
