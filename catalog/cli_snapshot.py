"""`catalog snapshot`."""

import typer

snapshot_app = typer.Typer(no_args_is_help=True, help="Frozen lists of samples.")
