"""`catalog split`."""

import typer

split_app = typer.Typer(no_args_is_help=True, help="Who is trained on, and who is held out.")
