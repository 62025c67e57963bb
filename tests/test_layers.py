"""The arrows between the packages go one way, and a trainer loads little."""

import ast
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# A process of its own: in this one everything is loaded.
LOADED = """
import json, sys
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(module: str) -> set[str]:
    """Return the top-level packages that importing `module` loads."""
    done = subprocess.run([sys.executable, "-c", LOADED.format(module=module)], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_a_trainer_loads_neither_sqlalchemy_nor_pydicom() -> None:
    """`loaderd.Feed` loads numpy and psycopg; what only the catalog and the command line need stays out of a training; frameworks too."""
    loaded = loaded_by("loaderd; loaderd.Feed")
    assert {"loaderd", "numpy", "psycopg"} <= loaded
    assert loaded & {"sqlalchemy", "alembic", "pydicom", "PIL", "typer", "rich", "torch", "jax", "keras", "tensorflow", "cv2"} == set()


def test_a_worker_loads_what_it_decodes_with() -> None:
    """Two decode workers start with each feed: they load numpy, and neither the database's client nor what changes images."""
    loaded = loaded_by("loaderd.decode")
    assert "numpy" in loaded
    assert loaded & {"psycopg", "sqlalchemy", "pydicom", "typer", "PIL", "cv2"} == set()


def test_a_command_loads_what_it_needs() -> None:
    """What takes long to load stays out of commands that do not read images: `import catalog.cli` loads neither pydicom nor SQLAlchemy."""
    loaded = loaded_by("catalog.cli")
    assert "typer" in loaded
    assert loaded & {"pydicom", "sqlalchemy", "alembic", "PIL", "scipy", "matplotlib", "h5py"} == set()


def test_the_embedded_server_needs_the_standard_library_alone() -> None:
    """`import catalog.embedded` loads nothing that is installed: its keeper runs without site-packages."""
    assert loaded_by("catalog.embedded") - sys.stdlib_module_names == {"catalog"}


def test_a_process_begins_with_the_standard_library_alone() -> None:
    """`import catalog.processes` loads nothing that is installed: what else a process of a command loads is its work's."""
    assert loaded_by("catalog.processes") - sys.stdlib_module_names == {"catalog", "__mp_main__"}  # multiprocessing's name for `__main__`


def test_the_catalog_knows_nothing_of_the_daemon() -> None:
    """No file of `catalog` or of the migrations imports `loaderd`, at the top or inside a function."""
    for path in (*REPOSITORY.glob("catalog/**/*.py"), *REPOSITORY.glob("migrations/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "loaderd" for name in names), path
