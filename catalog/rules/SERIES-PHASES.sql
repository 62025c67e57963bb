-- title: Slices differ in their number of phases
-- severity: warning
-- subject: series
-- version: 1
-- means: In a cine series every slice is imaged at the same number of moments of the heartbeat. Here a slice has more or fewer trigger times
--   than most. Images are missing, or of two acquisitions; end systole may not be among them, and phase 7 of one slice is another
--   moment than phase 7 of the next.
-- do: Look which images are missing (`catalog plot areas`, or positions and trigger times in view image_all), and get them.
-- parameter same: 0.01 mm; positions that differ by no more are one slice
WITH places AS (
    SELECT n.series_id, i.position, i.trigger_time, min(i.image_orientation) AS o
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    WHERE n.number_of_frames = 1 AND i.position IS NOT NULL AND i.trigger_time IS NOT NULL
    GROUP BY 1, 2, 3
), parallel AS (
    SELECT series_id FROM places GROUP BY series_id
    HAVING min(position) < max(position)
       AND greatest(max(o[1]) - min(o[1]), max(o[2]) - min(o[2]), max(o[3]) - min(o[3]),
                    max(o[4]) - min(o[4]), max(o[5]) - min(o[5]), max(o[6]) - min(o[6])) <= 0.01
), positions AS (
    SELECT series_id, position, count(*) AS phases, position - lag(position) OVER (PARTITION BY series_id ORDER BY position) > :same AS other
    FROM places JOIN parallel USING (series_id) GROUP BY series_id, position
), numbered AS (
    SELECT *, count(*) FILTER (WHERE other) OVER (PARTITION BY series_id ORDER BY position) AS slice FROM positions
), slices AS (
    SELECT series_id, min(position) AS position, sum(phases) AS phases FROM numbered GROUP BY series_id, slice
), usual AS (
    SELECT series_id, mode() WITHIN GROUP (ORDER BY phases DESC) AS phases, count(*) AS slices FROM slices GROUP BY series_id
    HAVING count(*) > 1 AND max(phases) > 1 AND min(phases) < max(phases)
), odd AS (
    SELECT DISTINCT ON (series_id) series_id, s.position, s.phases, u.phases AS usual, u.slices, count(*) OVER (PARTITION BY series_id) AS times
    FROM slices s JOIN usual u USING (series_id) WHERE s.phases <> u.phases
    ORDER BY series_id, abs(s.phases - u.phases) DESC, s.position
)
SELECT series_id AS subject_id, times::float8 AS value,
       format('%s of %s slices have another number of phases than the usual %s; the one at position %s mm has %s', times, slices, usual,
              round(position::numeric, 2), phases) AS detail
FROM odd

-- not evaluated
SELECT count(*), 'cine series of several directions, or in which only some images say their trigger time or where they lie' FROM (
    SELECT FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    CROSS JOIN LATERAL (SELECT i.image_orientation AS o) v
    GROUP BY n.series_id
    HAVING count(i.trigger_time) > 0 AND (count(i.trigger_time + i.position) < count(*)
        OR greatest(max(o[1]) - min(o[1]), max(o[2]) - min(o[2]), max(o[3]) - min(o[3]),
                    max(o[4]) - min(o[4]), max(o[5]) - min(o[5]), max(o[6]) - min(o[6])) > 0.01)) AS partly
