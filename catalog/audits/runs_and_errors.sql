-- title: Ingests, and what they could not take in
-- means: One row an ingest and kind of error, one row alone for an ingest without errors. A run that says running and whose host does
--   nothing was killed; the next one goes on where it ended.
-- must be empty: no
-- column run: Its number, as `catalog runs show` takes it.
-- column root: Name of the storage place.
-- column layout: How images and annotations were found and paired.
-- column state: running, finished, interrupted or failed.
-- column program_version: Version of scanfeed.
-- column host: Machine that read the files.
-- column started_at: When it began.
-- column finished_at: When it ended.
-- column undone_at: When what it brought was taken out again.
-- column files_seen: Files of the layout found.
-- column files_read: Files new or changed, and therefore read.
-- column stage: find, read, pair or mask; NULL: no error.
-- column code: Short stable name of the error.
-- column errors: How many of them.
SELECT i.id AS run, r.name AS root, i.layout, i.state, i.program_version, i.host, i.started_at, i.finished_at, i.undone_at, i.files_seen,
       i.files_read, e.stage, e.code, count(e.id) AS errors
FROM ingest_run i JOIN root r ON r.id = i.root_id LEFT JOIN ingest_error e ON e.ingest_run_id = i.id
GROUP BY i.id, r.name, e.stage, e.code
ORDER BY i.id, e.stage, e.code
