-- title: Instance numbers doubled or missing
-- severity: warning
-- subject: series
-- version: 1
-- means: Objects of the series have the same InstanceNumber (warning), or between the least and the largest some are missing (info). Where
--   contours are paired with images by number, as in many archives, a doubled number is ambiguous. Numbers alone prove no loss: scanners
--   leave some out, and extracts of a study do. Whether slices are missing, positions say: SERIES-GAP.
-- do: For doubled numbers, see whether images came twice or two acquisitions share a series; check pairings by number (`catalog pair list`).
WITH numbers AS (
    SELECT n.series_id, n.instance_number AS number, count(*) AS objects
    FROM scope c JOIN instance n ON n.series_id = c.series_id
    WHERE n.instance_number IS NOT NULL
      AND EXISTS (SELECT FROM image i JOIN location l ON l.image_id = i.id AND l.preferred WHERE i.instance_id = n.id)
    GROUP BY 1, 2
), followed AS (
    SELECT *, lead(number) OVER (PARTITION BY series_id ORDER BY number) AS next FROM numbers
), counted AS (
    SELECT series_id, min(number) AS first, max(number) AS last, max(number::bigint) - min(number) + 1 - count(*) AS missing,
           count(*) FILTER (WHERE objects > 1) AS doubled, sum(objects - 1) AS surplus, min(number) FILTER (WHERE objects > 1) AS twice,
           min(number) FILTER (WHERE next::bigint - number > 1) AS before, min(next) FILTER (WHERE next::bigint - number > 1) AS after
    FROM followed GROUP BY series_id
)
SELECT series_id AS subject_id, (surplus + missing)::float8 AS value,
       format('numbers run from %s to %s; ', first, last) || concat_ws('; ',
           CASE WHEN doubled > 0 THEN format('numbers of several objects: %s, the first is %s', doubled, twice) END,
           CASE WHEN missing > 0 THEN format('missing: %s, the first between %s and %s', missing, before, after) END) AS detail,
       CASE WHEN doubled > 0 THEN 'warning' ELSE 'info' END AS severity
FROM counted WHERE doubled > 0 OR missing > 0

-- not evaluated
SELECT count(*), 'objects without a number' FROM scope c JOIN instance n ON n.series_id = c.series_id
WHERE n.instance_number IS NULL
  AND EXISTS (SELECT FROM image i JOIN location l ON l.image_id = i.id AND l.preferred WHERE i.instance_id = n.id)
