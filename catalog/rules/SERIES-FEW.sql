-- title: Very few slices
-- severity: info
-- subject: series
-- version: 1
-- means: A series of a scanner that makes stacks (CT, MR, PT) has fewer slices than a stack needs: perhaps an extract, or the rest did not
--   arrive. Whether slices are missing cannot be told from so few. A series of several images at one place (cine, dynamic) is none such,
--   nor one in several directions (localizer).
-- do: Nothing, for work on single images. For volumes, ask for the rest.
-- parameter least: 3 slices
WITH few AS MATERIALIZED (
    SELECT n.series_id FROM scope c JOIN series se ON se.id = c.series_id AND se.modality IN ('CT', 'MR', 'PT')
    JOIN instance n ON n.series_id = c.series_id GROUP BY n.series_id
    HAVING count(*) FILTER (WHERE number_of_frames > 0) < :least
)
SELECT n.series_id AS subject_id, count(*)::float8 AS value, format('slices: %s, fewer than %s', count(*), :least) AS detail
FROM few f JOIN instance n ON n.series_id = f.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
GROUP BY n.series_id
HAVING count(*) < :least AND count(DISTINCT i.position) = count(*) AND count(DISTINCT i.image_orientation) = 1

-- not evaluated
SELECT count(DISTINCT n.series_id), 'series with images that do not say where they lie'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred WHERE i.position IS NULL
