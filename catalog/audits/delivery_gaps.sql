-- title: Positions that the ledger lost or counts twice
-- means: One row an epoch of which a position has no outcome or two, or whose ledger speaks of positions that it does not have. What was
--   fed is not known exactly there.
-- must be empty: yes
-- column run: The training.
-- column stream: Number of the stream.
-- column epoch: Pass over the stream, from 0.
-- column planned: Positions of its order.
-- column missing: Positions without an outcome that should have one.
-- column twice: Positions with two outcomes.
-- column beyond: Positions in the ledger that its order does not have.
SELECT c.run, c.stream, c.epoch, c.planned, c.missing, c.twice, coalesce(l.beyond, 0) AS beyond
FROM epoch_coverage c JOIN run r ON r.name = c.run
JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream AND e.epoch = c.epoch
LEFT JOIN (
    SELECT x.epoch_id, length_of(range_agg(x.positions) - int8multirange(int8range(0, y.num_samples))) AS beyond
    FROM ledger x JOIN epoch y ON y.id = x.epoch_id GROUP BY x.epoch_id, y.num_samples
) l ON l.epoch_id = e.id
WHERE c.missing <> 0 OR c.twice <> 0 OR l.beyond <> 0
ORDER BY c.run, c.stream, c.epoch
