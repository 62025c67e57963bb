-- title: Almost the same image under another patient
-- severity: warning
-- subject: image
-- version: 1
-- scope: all
-- means: The image looks like one of another patient: of the 64 bits of their near hashes two at most differ, as they do after rescaling,
--   compression with loss or a little noise. Of 62,400 pairs of images of two real patients none came within 18 bits. One person may be here
--   under two names, as originals and as a converted copy; a split by patient would put them into training and testing.
--   Images whose pixels are the same altogether are found by IDENTITY-PIXELS-PATIENTS.
-- do: Look at both (`catalog show`). If they are one person, bring them under one patient, or take one out.
-- parameter bits: 2 bits; how many may differ, 2 at most: of pairs that differ in more some would be missed
-- parameter patients: 20 ; a hash that more patients share is a blank or a template, and counted as not evaluated
-- parameter crowd: 500 ; so many hashes that share half of their bits are compared with each other, no more
WITH hashed AS MATERIALIZED (
    SELECT i.id, i.pixel_hash, m.near_hash AS hash, st.patient_id AS patient
    FROM measure m JOIN image i ON i.id = m.image_id JOIN location l ON l.image_id = i.id AND l.preferred
    JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
    WHERE m.near_hash <> 0
), hashes AS MATERIALIZED (
    SELECT hash, min(patient) AS first, max(patient) AS last FROM (SELECT DISTINCT hash, patient FROM hashed ORDER BY hash OFFSET 0) AS d
    GROUP BY hash HAVING count(*) <= :patients
), masks (mask) AS (
    -- Two hashes that differ in two bits share two of their four quarters: one of six halves. Sorted, as what is planned for want of
    -- statistics, a table of few groups in memory, spills to disk again and again.
    VALUES (-4294967296), (-281470681808896), (-281474976645121), (281474976645120), (281470681808895), (4294967295)
), shared AS MATERIALIZED (
    SELECT m.mask, s.half FROM masks m CROSS JOIN LATERAL (
        SELECT half FROM (SELECT hash & m.mask AS half, first, last FROM hashes ORDER BY 1 OFFSET 0) AS h
        GROUP BY half HAVING min(first) < max(last) AND count(*) BETWEEN 2 AND :crowd) s
), members AS MATERIALIZED (
    -- IS TRUE keeps it from being planned as a join, which, for want of statistics, would be a loop over all pairs.
    SELECT m.mask, h.hash & m.mask AS half, h.* FROM masks m CROSS JOIN hashes h
    WHERE ((m.mask, h.hash & m.mask) IN (SELECT mask, half FROM shared)) IS TRUE
), pairs AS (
    SELECT DISTINCT a.hash AS a, b.hash AS b, bit_count((a.hash # b.hash)::bit(64)) AS bits
    FROM members a JOIN members b USING (mask, half)
    WHERE a.hash < b.hash AND bit_count((a.hash # b.hash)::bit(64)) <= least(:bits, 2)
      AND NOT (a.first = b.last AND a.last = b.first)
), near AS (
    SELECT a AS hash, b AS other, bits FROM pairs UNION ALL SELECT b, a, bits FROM pairs
    UNION ALL SELECT hash, hash, 0 FROM hashes WHERE first < last
), others AS (
    SELECT hash, patient, pixel_hash, min(id) AS id FROM hashed JOIN (SELECT DISTINCT other AS hash FROM near) AS d USING (hash) GROUP BY 1, 2, 3
)
SELECT DISTINCT ON (h.id) h.id AS subject_id, e.bits::float8 AS value,
       format('%s of 64 bits differ from sample %s, of another patient', e.bits, o.id) AS detail
FROM near e JOIN hashed h USING (hash) JOIN others o ON o.hash = e.other AND o.patient <> h.patient
WHERE o.pixel_hash IS DISTINCT FROM h.pixel_hash
ORDER BY h.id, e.bits, o.id

-- not evaluated
SELECT count(*) FILTER (WHERE coalesce(m.near_hash, 0) = 0), 'images without a near hash: not measured, constant, or under 32 px'
FROM location l LEFT JOIN measure m ON m.image_id = l.image_id WHERE l.preferred
UNION ALL
SELECT coalesce(sum(images), 0), 'images whose near hash is that of too many patients' FROM (
    SELECT sum(images) AS images FROM (
        SELECT m.near_hash AS hash, st.patient_id, count(*) AS images
        FROM measure m JOIN image i ON i.id = m.image_id JOIN location l ON l.image_id = i.id AND l.preferred
        JOIN instance n ON n.id = i.instance_id JOIN series se ON se.id = n.series_id JOIN study st ON st.id = se.study_id
        WHERE m.near_hash IN (SELECT near_hash FROM measure WHERE near_hash <> 0 GROUP BY 1 HAVING count(*) > :patients) GROUP BY 1, 2) AS d
    GROUP BY hash HAVING count(*) > :patients) AS many
UNION ALL
SELECT coalesce(sum(s.hashes), 0), 'near hashes that share half of their bits with too many' FROM (
    VALUES (-4294967296), (-281470681808896), (-281474976645121), (281474976645120), (281470681808895), (4294967295)) AS m (mask)
CROSS JOIN LATERAL (
    SELECT count(*) AS hashes FROM (SELECT DISTINCT near_hash & m.mask AS half, near_hash FROM measure WHERE near_hash <> 0 ORDER BY 1 OFFSET 0) AS h
    GROUP BY half HAVING count(*) > :crowd) AS s
