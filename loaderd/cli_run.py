"""`loaderd run`, `audit` and `prune`: trainings and what they were fed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from catalog.errors import UsageError
from catalog.output import AsJson, DatabaseUrl, DryRun, print_json
from loaderd.output import cell, count, opened, print_rows

RunName = Annotated[str, typer.Argument(metavar="RUN", help="The training's name.")]

app = typer.Typer(no_args_is_help=True, help="Runs: list and show them, note what became of them.")


@app.command("list")
def run_list(database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the trainings and what they were fed."""
    from loaderd import runs

    with opened(database) as db, db.connect() as conn:
        found = runs.listed(conn)
    if as_json:
        print_json(found)
        return
    rows = [{**row, "streams": [runs.called(one["stream"], one["stream_name"]) for one in row["streams"]]} for row in found]
    columns = {"run": "run", "opened": "opened", "live": "live", "streams": "streams", "attempts": "attempts", "last_epoch": "last epoch",
               "delivered": "delivered", "models": "models"}  # fmt: skip
    print_rows(rows, columns, "no run yet")


@app.command("show")
def run_show(run: RunName, database: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show a training: its attempts, consumers, epochs, notes, and what it was fed with."""
    from loaderd import runs

    with opened(database) as db, db.connect() as conn:
        found = runs.shown(conn, run)
    if as_json:
        print_json(found)
        return
    typer.echo(f"run {run!r}, opened {cell(found['opened'])} by scanfeed {found['program_version']} on {found['host']}")
    for part in ("attempts", "consumers", "epochs", "notes"):
        typer.echo(f"\n{part}")
        rows = found[part]
        shown = [name for name in rows[0] if part != "epochs" or name not in ("stream_name", "order_sha256")] if rows else []
        print_rows(rows, {name: name for name in shown}, "none")
    for row in found["provenance"]:
        typer.echo(f"\nprovenance, stream {runs.called(row['stream'], row['stream_name'])}")
        for name in ("stream_sha256", "snapshot_sha256", "definition", "transforms", "constants", "daemon_versions", "trainer_versions",
                     "order_sha256s",
                     "models"):  # fmt: skip
            values = row[name] if isinstance(row[name], list) else [row[name]]
            for value in values:
                typer.echo(f"  {name:<16}  {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else cell(value)}")


@app.command("note")
def run_note(
    run: RunName,
    text: Annotated[str, typer.Argument(help="What to note, in words.", show_default=False)] = "",
    database: DatabaseUrl = None,
    model_sha256: Annotated[str | None, typer.Option(metavar="HEX", help="A model that it made.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="The same, from the model's file.", show_default=False)] = None,
    actor: Annotated[str | None, typer.Option(help="Who notes it; by default the OS user.", show_default=False)] = None,
) -> None:
    """Note a remark on a training or a model that it made; `catalog sql` on the view sample_history then knows the model, too."""
    import hashlib

    from catalog.flags import os_user
    from loaderd import runs

    if model is not None and model_sha256 is not None:
        raise UsageError("--model and --model-sha256: choose one")
    digest: bytes | None = None
    if model is not None:
        with model.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").digest()
    elif model_sha256 is not None:
        try:
            digest = bytes.fromhex(model_sha256)
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise UsageError(f"--model-sha256 {model_sha256!r}: must be 64 hex digits; --model FILE computes them")
    if not text and digest is None:
        raise UsageError("run note: nothing to note; give a text, --model FILE or --model-sha256 HEX")
    with opened(database) as db, db.connect() as conn:
        runs.note(conn, run, text, digest, actor or os_user())
    typer.echo(f"run {run!r}: noted{f', model {digest.hex()}' if digest else ''}")


def audit(
    run: Annotated[str | None, typer.Argument(help="Of this training alone.", show_default=False)] = None,
    database: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Prove that every planned position came once, in the stored order. Exit code 3: something is missing, twice or not what was fed."""
    from psycopg import IsolationLevel

    from loaderd import runs

    with opened(database) as db, db.connect() as conn:
        conn.isolation_level, conn.read_only = IsolationLevel.REPEATABLE_READ, True
        found = runs.audit(conn, run)
    if as_json:
        print_json(asdict(found))
    else:
        for finding in found.findings:
            typer.echo(str(finding))
        if found.erased:
            typer.echo(f"{found.erased} positions are of patients who were erased since: their orders cannot be compared any more")
        typer.echo(f"{count(found.runs, 'run')}, {count(found.epochs, 'epoch')}: {count(len(found.findings), 'finding')}")
    raise typer.Exit(3 if found.findings else 0)


def prune(
    database: DatabaseUrl = None,
    run: Annotated[str | None, typer.Option(help="Of this training alone.", show_default=False)] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Epochs of which nothing was fed for so long: 90d, 12h, 4w.", show_default=False)
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="But the newest N epochs of each run and stream.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Drop orders and ledger rows of epochs that are over; digests, summaries and the patients stay. Exit code 3: an audit finds something.

    All conditions must fit. The newest epoch of a run and stream always stays, and so does one at which `loaderd audit` finds something.
    """
    from loaderd import runs

    with opened(database) as db, db.connect(autocommit=True) as conn:
        done = runs.prune(conn, run=run, older_than=None if older_than is None else runs.age(older_than), keep=keep, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(done)})
    else:
        for row in done.epochs:
            typer.echo(
                f"run {row['run']!r}, stream {runs.called(row['stream'], row['stream_name'])}, epoch {row['epoch']}: {row['bytes']} bytes"
            )
        for finding in done.findings:
            typer.echo(f"left alone: {finding}")
        typer.echo(
            f"{'would drop' if dry_run else 'dropped'} {count(len(done.epochs), 'epoch')} and {count(done.provisional, 'order')} "
            f"that nobody asked for: {done.bytes} bytes of the tables are free for new rows"
        )
    raise typer.Exit(3 if done.findings else 0)
