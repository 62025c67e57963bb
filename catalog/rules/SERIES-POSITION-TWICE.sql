-- title: Several images at one place, where the others have one
-- severity: warning
-- subject: series
-- version: 1
-- means: At some places of the series there are more images than at most of its others: with the same position (to 0.01 mm) and
--   TriggerTime. Slices were sent twice under new UIDs, or two acquisitions are mixed. Where every place has the same number of images
--   (echoes, contrast phases, diffusion weightings) nothing is found. Phases of a cine series differ in TriggerTime.
-- do: Look at the images at that place; keep those that are right. A contour is paired with one of them by number only.
WITH places AS (
    SELECT n.series_id, round(i.image_position[1] * 100) AS x, round(i.image_position[2] * 100) AS y, round(i.image_position[3] * 100) AS z,
           i.trigger_time, count(*) AS images, min(i.position) AS position
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    WHERE n.number_of_frames = 1 AND i.position IS NOT NULL
    GROUP BY 1, 2, 3, 4, 5
), uneven AS (
    SELECT series_id FROM places GROUP BY series_id HAVING min(images) < max(images)
), usual AS (
    SELECT series_id, mode() WITHIN GROUP (ORDER BY images) AS images, count(*) AS places FROM places JOIN uneven USING (series_id) GROUP BY 1
)
SELECT p.series_id AS subject_id, sum(p.images - u.images)::float8 AS value,
       format('%s of %s places hold up to %s images, the others %s; the first at position %s mm%s', count(*), min(u.places), max(p.images),
              min(u.images), round(min(p.position)::numeric, 2),
              CASE WHEN count(p.trigger_time) > 0 THEN '; their trigger times are the same too' ELSE '' END) AS detail
FROM places p JOIN usual u ON u.series_id = p.series_id AND p.images > u.images
GROUP BY p.series_id

-- not evaluated
SELECT count(DISTINCT n.series_id), 'series with images that do not say where they lie, or with several frames in one object'
FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
JOIN location l ON l.image_id = i.id AND l.preferred
WHERE i.position IS NULL OR n.number_of_frames > 1
