-- title: What was fed
-- means: One row an epoch that began: of the positions planned, what was delivered, taken over by the trainer, dropped, revoked or
--   unreadable. What must not be is in delivery_gaps.
-- must be empty: no
-- column run: The training.
-- column stream: Number of the stream.
-- column stream_name: Its name, if it has one.
-- column epoch: Pass over the stream, from 0.
-- column planned: Positions of its order.
-- column delivered: Positions delivered.
-- column acknowledged: Of these, what the trainer went on from.
-- column dropped: Positions left out by the tail.
-- column revoked: Positions left out as somebody revoked them.
-- column unreadable: Positions whose files could not be read.
-- column replayed: Positions that a later attempt delivered again.
-- column finished: Does every position have an outcome?
-- column consumers: Processes that were given some of it.
-- column started_at: When its first batch was asked for.
-- column last_at: When its last row was written to the ledger.
-- column pruned_at: When its order and ledger were dropped; the numbers are kept.
SELECT c.run, c.stream, c.stream_name, c.epoch, c.planned, c.delivered, c.acknowledged, c.dropped, c.revoked, c.unreadable, c.replayed,
       c.finished, l.consumers, c.started_at, l.last_at, c.pruned_at
FROM epoch_coverage c JOIN run r ON r.name = c.run
JOIN epoch e ON e.run_id = r.id AND e.stream_id = c.stream AND e.epoch = c.epoch
LEFT JOIN (SELECT epoch_id, count(DISTINCT consumer) AS consumers, max(at) AS last_at FROM ledger GROUP BY epoch_id) l ON l.epoch_id = e.id
ORDER BY c.run, c.stream, c.epoch
