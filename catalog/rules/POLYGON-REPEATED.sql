-- title: The same polygon on several images
-- severity: error
-- subject: pairing
-- version: 1
-- scope: all
-- means: Point for point the same polygon is on other images too, of this patient or of another: nobody draws two alike, so it was copied.
--   Each is compared with what else is known of its own image: the structure around it or inside it, and the same structure on the
--   slices and phases beside it. Those that contradict it are errors. If one alone agrees, it is the original: an info, which names the
--   others. Where nothing decides, all are errors.
-- do: Reject or correct those that are errors (`catalog pair reject`, or the file); the info closes itself then.
-- parameter least_points: 5 points from which two polygons are not alike by chance; rectangles and triangles may be
-- parameter slack: 0.02 share of the inner mask that may lie outside the outer one
-- parameter share: 0.8 share of the smaller mask that must lie in that on the next slice or phase
-- parameter least_mm: 3 mm that radii may differ by from one slice or phase to the next
-- parameter per_mm: 0.65 mm more that they may differ by for each mm from slice to slice
-- parameter per_ms: 0.06 mm more that they may differ by for each ms from phase to phase
-- parameter apart_mm: 25 mm from slice to slice beyond which they are no neighbours
WITH drawn AS MATERIALIZED (
    SELECT p.id, p.annotation_id, p.image_id, coalesce(h.polygon_hash, a.content_hash) AS hash
    FROM annotation a JOIN pairing p ON p.annotation_id = a.id AND p.state = 'accepted' LEFT JOIN shape h ON h.pairing_id = p.id
    WHERE a.current AND a.kind = 'polygon' AND coalesce(h.points, a.rings[1]) >= :least_points
), shared AS (
    SELECT hash FROM drawn GROUP BY hash HAVING min(image_id) < max(image_id)
), repeated AS MATERIALIZED (
    SELECT d.* FROM drawn d JOIN shared USING (hash)
), beside AS (
    SELECT r.id, r.hash, o.other_id AS other, o.kind, o.apart, o.pixels, true AS inside
    FROM repeated r JOIN overlap o ON o.pairing_id = r.id
    UNION ALL
    SELECT r.id, r.hash, o.pairing_id, o.kind, o.apart, o.pixels, false FROM repeated r JOIN overlap o ON o.other_id = r.id
), evidence AS (
    SELECT b.id, b.kind, CASE b.kind
        WHEN 'image' THEN (CASE WHEN b.inside THEN m.area_px ELSE om.area_px END) - b.pixels
            <= :slack * CASE WHEN b.inside THEN m.area_px ELSE om.area_px END
        ELSE b.pixels >= :share * least(m.area_px, om.area_px) AND (i.row_spacing IS NULL OR i.column_spacing IS NULL OR
            abs(sqrt(m.area_px) - sqrt(om.area_px)) * sqrt(i.row_spacing * i.column_spacing / pi())
            <= :least_mm + b.apart * CASE b.kind WHEN 'slice' THEN :per_mm ELSE :per_ms END) END AS fits
    FROM beside b JOIN pairing p ON p.id = b.id JOIN image i ON i.id = p.image_id JOIN annotation a ON a.id = p.annotation_id
    JOIN pairing q ON q.id = b.other AND q.state = 'accepted' JOIN annotation oa ON oa.id = q.annotation_id AND oa.current
    JOIN mask m ON m.pairing_id = b.id JOIN mask om ON om.pairing_id = b.other LEFT JOIN shape k ON k.pairing_id = b.other
    WHERE coalesce(k.polygon_hash, oa.content_hash) <> b.hash AND m.area_px > 0 AND om.area_px > 0
      AND CASE b.kind WHEN 'image' THEN oa.structure_id <> a.structure_id WHEN 'slice' THEN b.apart <= :apart_mm ELSE true END
), verdict AS (
    SELECT r.*, coalesce(e.related_against, 0) > 0 OR 2 * coalesce(e.beside_against, 0) > coalesce(e.beside, 0) AS contradicts,
           coalesce(e.fits, 0) > 0 AS backed, coalesce(e.related_against, 0) > 0 AS by_relation
    FROM repeated r LEFT JOIN (
        SELECT id, count(*) FILTER (WHERE kind = 'image' AND NOT fits) AS related_against,
               count(*) FILTER (WHERE kind <> 'image') AS beside,
               count(*) FILTER (WHERE kind <> 'image' AND NOT fits) AS beside_against, count(*) FILTER (WHERE fits) AS fits
        FROM evidence GROUP BY id
    ) e USING (id)
), whole AS (
    SELECT hash, count(*) AS members, count(*) FILTER (WHERE backed AND NOT contradicts) AS agree,
           (array_agg(id ORDER BY id))[1:6] AS ids,
           (array_agg(format('annotation %s on sample %s', annotation_id, image_id) ORDER BY id))[1:6] AS names
    FROM verdict GROUP BY hash
), judged AS (
    SELECT v.*, w.members, w.agree, w.agree = 1 AND v.backed AND NOT v.contradicts AS original,
           (SELECT string_agg(name, ', ') FROM (
               SELECT name FROM unnest(w.ids, w.names) AS u (other, name) WHERE other <> v.id LIMIT 5) AS others) AS others
    FROM verdict v JOIN whole w USING (hash)
)
SELECT id AS subject_id, members AS value,
       format('the same polygon as %s%s; ', others, CASE WHEN members > 6 THEN format(' and %s more', members - 6) END)
       || CASE WHEN original THEN 'this one agrees with the other contours of its image and its neighbours, the others do not'
               WHEN contradicts AND by_relation THEN 'here it contradicts the other structures of its image'
               WHEN contradicts THEN 'here it contradicts its neighbouring slices or phases'
               WHEN agree > 1 THEN 'several of them agree with what is around them, so nothing decides which is right'
               ELSE 'nothing here decides whether it is right' END AS detail,
       CASE WHEN original THEN 'info' ELSE 'error' END AS severity
FROM judged
