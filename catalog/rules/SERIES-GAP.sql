-- title: Slice missing, or slices unevenly apart
-- severity: warning
-- subject: series
-- version: 1
-- means: Along the normal of parallel slices, the distance of two neighbouring ones differs from the usual distance (the median) in the
--   series. Twice the distance is a slice that is missing; volumes summed over slices are then wrong. Positions count here, never file or
--   instance numbers. A slice that is missing at either end leaves no gap: see SERIES-INCOMPLETE.
-- do: Get the missing slices, or leave the series out of what needs whole volumes.
-- parameter most: 0.1 of the usual distance; how far a distance may be off it
-- parameter same: 0.01 mm; positions that differ by no more are one slice
WITH places AS (
    SELECT n.series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END AS stack, i.position, min(i.image_orientation) AS a,
           max(i.image_orientation) AS b
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    WHERE i.position IS NOT NULL
    GROUP BY 1, 2, 3
), parallel AS (
    SELECT series_id, stack FROM places GROUP BY series_id, stack
    HAVING count(*) > 2
       AND greatest(max(greatest(a[1], b[1])) - min(least(a[1], b[1])),
                    max(greatest(a[2], b[2])) - min(least(a[2], b[2])),
                    max(greatest(a[3], b[3])) - min(least(a[3], b[3])),
                    max(greatest(a[4], b[4])) - min(least(a[4], b[4])),
                    max(greatest(a[5], b[5])) - min(least(a[5], b[5])),
                    max(greatest(a[6], b[6])) - min(least(a[6], b[6]))) <= 0.01
), steps AS (
    SELECT series_id, stack, position, position - lag(position) OVER (PARTITION BY series_id, stack ORDER BY position) AS step
    FROM places JOIN parallel USING (series_id, stack)
), usual AS (
    SELECT series_id, stack, percentile_disc(0.5) WITHIN GROUP (ORDER BY step) AS step, count(*) AS steps
    FROM steps WHERE step > :same GROUP BY series_id, stack HAVING count(*) > 1
), odd AS (
    SELECT s.series_id, s.stack, s.position, s.step, u.step AS usual, u.steps, abs(s.step / u.step - 1) AS off,
           CASE WHEN s.step > 1.5 * u.step THEN round(s.step / u.step) - 1 ELSE 0 END AS missing
    FROM steps s JOIN usual u USING (series_id, stack)
    WHERE s.step > :same AND abs(s.step / u.step - 1) > :most + 1e-9
), worst AS (
    SELECT DISTINCT ON (series_id, stack) *, count(*) OVER stacks AS times, sum(missing) OVER stacks AS all_missing
    FROM odd WINDOW stacks AS (PARTITION BY series_id, stack) ORDER BY series_id, stack, off DESC, position
)
SELECT series_id AS subject_id, max(off) AS value,
       min(format('%s of %s distances differ from the usual %s mm: most of all %s mm, between positions %s and %s mm%s', times, steps,
              round(usual::numeric, 3), round(step::numeric, 3), round((position - step)::numeric, 2), round(position::numeric, 2),
              CASE WHEN all_missing > 0 THEN format('; slices missing: %s', all_missing) ELSE '' END)) AS detail
FROM worst GROUP BY series_id

-- not evaluated
SELECT count(DISTINCT series_id), 'series with images that do not say where they lie'
FROM scope c JOIN instance n USING (series_id) JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.position IS NULL
UNION ALL
SELECT count(*), 'series of several directions, in which no image is another''s neighbour' FROM (
    SELECT FROM scope c JOIN instance n USING (series_id) JOIN image i ON i.instance_id = n.id JOIN location l ON l.image_id = i.id AND l.preferred
    CROSS JOIN LATERAL (SELECT i.image_orientation AS o) v
    GROUP BY series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END
    HAVING greatest(max(o[1]) - min(o[1]), max(o[2]) - min(o[2]), max(o[3]) - min(o[3]),
                    max(o[4]) - min(o[4]), max(o[5]) - min(o[5]), max(o[6]) - min(o[6])) > 0.01) AS mixed
