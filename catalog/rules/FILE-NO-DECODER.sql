-- title: File that nothing installed can decompress
-- severity: warning
-- subject: file
-- version: 1
-- scope: all
-- means: The pixels are compressed in a way (transfer syntax) that no installed package decodes. The file itself may be well. It is a
--   cause of FILE-UNREADABLE, named apart because the remedy is another.
-- do: Install what the text names, on each machine that ingests or feeds, and ingest again.
SELECT g.file_id AS subject_id, NULL::float8 AS value, substring(g.detail FROM 13) AS detail
FROM flag g WHERE g.rule = 'FILE-UNREADABLE' AND g.state = 'open' AND g.file_id IS NOT NULL AND starts_with(g.detail, 'no-decoder: ')
