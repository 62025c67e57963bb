-- title: What snapshots hold
-- means: Frozen lists of samples, with what became of them since: erased patients, withdrawn consent, flags raised later.
-- must be empty: no
-- column snapshot: Its name.
-- column sha256: Digest of its content.
-- column created_at: When it was made.
-- column actor: By whom.
-- column samples: Samples when it was made.
-- column patients: Patients when it was made.
-- column erased: Samples of patients who were erased since.
-- column revoked: Samples that are not fed any more, since consent was withdrawn or a flag revokes them.
-- column flagged: Samples with an open error now: a stream on the snapshot feeds them all the same.
SELECT s.name AS snapshot, encode(s.sha256, 'hex') AS sha256, s.created_at, s.actor, s.num_samples AS samples, s.num_patients AS patients,
       count(*) FILTER (WHERE k.erasure_id IS NOT NULL) AS erased, count(r.sample_id) AS revoked, count(f.number) AS flagged
FROM snapshot s JOIN snapshot_sample k ON k.snapshot_id = s.id
LEFT JOIN revoked_image r ON r.sample_id = k.image_id
LEFT JOIN (
    SELECT m.snapshot_id, m.number FROM flag g JOIN snapshot_mask m ON m.pairing_id = g.pairing_id
    WHERE g.state = 'open' AND g.severity = 'error'
    UNION
    SELECT m.snapshot_id, m.number FROM flag g JOIN pairing q ON q.annotation_id = g.annotation_id
    JOIN snapshot_mask m ON m.pairing_id = q.id WHERE g.state = 'open' AND g.severity = 'error'
    UNION
    SELECT k.snapshot_id, k.number FROM snapshot_sample k JOIN image_all i ON i.sample_id = k.image_id WHERE i.error_flags > 0
) f ON (f.snapshot_id, f.number) = (k.snapshot_id, k.number)
GROUP BY s.id
ORDER BY s.id
