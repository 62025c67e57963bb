-- title: Slices are not stacked at a right angle
-- severity: info
-- subject: series
-- version: 1
-- means: The gantry was tilted (GantryDetectorTilt), or the slices are shifted against each other in their own plane, as a tilt does. Each image
--   is right by itself. A volume that is stacked from them without regard to the shift is sheared: so are its coronal and sagittal views.
-- do: Nothing, for work on single images. For volumes, resample by position and direction of each slice.
-- parameter least: 0.5 degrees; tilt from which it is reported
WITH stacks AS (
    SELECT n.series_id, CASE WHEN n.number_of_frames > 1 THEN n.id ELSE 0 END AS stack, max(abs(n.gantry_tilt)) AS tilt,
           max(i.position) - min(i.position) >= 1 AND greatest(
               max(i.image_orientation[1]) - min(i.image_orientation[1]), max(i.image_orientation[2]) - min(i.image_orientation[2]),
               max(i.image_orientation[3]) - min(i.image_orientation[3]), max(i.image_orientation[4]) - min(i.image_orientation[4]),
               max(i.image_orientation[5]) - min(i.image_orientation[5]), max(i.image_orientation[6]) - min(i.image_orientation[6])) <= 0.01
               AS parallel,
           min(i.position || i.image_position) FILTER (WHERE i.position IS NOT NULL) AS a,
           max(i.position || i.image_position) FILTER (WHERE i.position IS NOT NULL) AS b
    FROM scope c JOIN instance n ON n.series_id = c.series_id JOIN image i ON i.instance_id = n.id
    JOIN location l ON l.image_id = i.id AND l.preferred
    GROUP BY 1, 2
), angles AS (
    SELECT series_id, coalesce(tilt, 0) AS tilt, coalesce(CASE WHEN parallel THEN degrees(acos(least(1.0,
           (b[1] - a[1]) / nullif(sqrt((b[2] - a[2]) ^ 2 + (b[3] - a[3]) ^ 2 + (b[4] - a[4]) ^ 2), 0)))) END, 0) AS shear
    FROM stacks
)
SELECT series_id AS subject_id, max(greatest(tilt, shear)) AS value,
       format('GantryDetectorTilt is %s; first and last slice are shifted by %s degrees against their normal', CASE WHEN max(tilt) > 0 THEN
              round(max(tilt)::numeric, 2) || ' degrees' ELSE '0 or not given' END, round(max(shear)::numeric, 2)) AS detail
FROM angles WHERE greatest(tilt, shear) > :least GROUP BY series_id
