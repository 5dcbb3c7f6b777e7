"""Secrets of users (keys of judges, of W&B, of a hub; signing secrets of webhooks), encrypted at rest.

The key that opens them is PREFTUNE_SECRET_KEY, or the file ``secret.key`` in the installation's folder, readable by its
owner alone. It is not in the database and not in a backup: who has only those reads no secret.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from preftune.app.jobs.platform import Platform
from preftune.core.errors import InputError, PreftuneError
from preftune.store.base import Query
from preftune.store.records import Secret, new_id

VARIABLE = "PREFTUNE_SECRET_KEY"
KEY_FILE = "secret.key"


class SecretUnreadable(PreftuneError):
    """A secret that the installation's key does not open."""


def keep(platform: Platform, project: str, name: str, value: str) -> Secret:
    """Keep a secret under a name of the project, in the place of an older one of that name; what comes back holds no value."""
    token = _box(platform).encrypt(value.encode()).decode("ascii")
    while True:
        found = platform.store.page(Secret, Query(project, {"name": name}, limit=1)).items
        if not found:
            return platform.store.insert(Secret(id=new_id("secret_"), project=project, name=name, ciphertext=token))
        changed = platform.store.change(Secret, found[0].id, {"ciphertext": token})
        if changed is not None:
            return changed


def read(platform: Platform, secret_id: str, project: str) -> str:
    """The value of a project's secret.

    Raises
        SecretUnreadable: it is gone, or was kept under another key.
    """
    secret = platform.store.get(Secret, secret_id, project)
    if secret is None or not secret.ciphertext:
        raise SecretUnreadable(f"there is no secret {secret_id!r}; give the key again")
    try:
        return _box(platform).decrypt(secret.ciphertext.encode()).decode()
    except InvalidToken:
        raise SecretUnreadable(
            f"secret {secret.name!r} was kept under another key: set {VARIABLE}, bring {KEY_FILE} back, or give the secret again"
        ) from None


def forget(platform: Platform, project: str, name: str) -> None:
    """Let go of a secret's value; its name stays, so that a read says that the value is gone."""
    for found in platform.store.page(Secret, Query(project, {"name": name}, limit=1)).items:
        platform.store.change(Secret, found.id, {"ciphertext": ""})


def _box(platform: Platform) -> Fernet:
    given = os.environ.get(VARIABLE, "").strip()
    try:
        return Fernet((given or _key_of(platform.home)).encode())
    except ValueError:
        where = VARIABLE if given else str(platform.home / KEY_FILE)
        raise InputError(f"{where} is no key: it needs 32 bytes in url-safe base64, as `Fernet.generate_key()` gives") from None


def _key_of(home: Path) -> str:
    """The key of the folder, made by whoever comes first."""
    path = home / KEY_FILE
    if not path.is_file():
        home.mkdir(parents=True, exist_ok=True)
        fresh = home / f"{KEY_FILE}.{os.getpid()}-{os.urandom(4).hex()}"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Fernet.generate_key())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)  # fails where another process was faster: then its key holds
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path.read_text(encoding="ascii").strip()
