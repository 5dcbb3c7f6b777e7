"""``preftune --server URL chat`` and ``export``: a server's model answers here, or its weights are fetched."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preftune.app.chat import Chat
from preftune.cli.output import say
from preftune.core.errors import UsageError
from preftune.core.recipe import DecodingConfig

if TYPE_CHECKING:
    from preftune.sdk import Client


class RemoteChat(Chat):
    """A conversation whose answers a server writes; what is said and recorded stays here."""

    def __init__(self, client: Client, given: str, decoding: DecodingConfig, seed: int, system: str | None) -> None:
        self._client = client
        super().__init__(given, Path(), decoding, seed, system)

    @property
    def is_text(self) -> bool:
        """The server renders the turns, whatever the model's template is."""
        return False

    def answer(self, *, of_baseline: bool = False) -> Iterator[str]:
        """Pieces of the answer to what was said last."""
        name = self.baseline[0] if of_baseline and self.baseline is not None else self.name
        yield from self._client.chat_stream(
            name, self._rows(), max_tokens=self.decoding.max_new_tokens, temperature=self.decoding.temperature,
            seed=(self.seed * 1_000_003 + self._asked) % 2**31,
        )  # fmt: skip

    def _load(self, given: str) -> Any:
        """Nothing is loaded here; the server says at the first answer where it does not know the name."""
        del given


def export_there(server: str, model: str, to: Path, form: Literal["merged", "adapter"]) -> Path:
    """The weights of a server's model as a folder. It is whole or not there.

    Raises
        UsageError: something is at the place already.
        ApiError: the server has no such model, or does not give it.
    """
    from preftune.sdk import Client

    if to.exists():
        raise UsageError(f"{to}: something is there already; name a folder that does not exist yet")
    to.parent.mkdir(parents=True, exist_ok=True)
    with Client(server) as client, tempfile.TemporaryDirectory(prefix=".preftune-", dir=to.parent) as folder:
        last = [0]

        def tell(done: int, total: int) -> None:
            tenth = 10 * done // max(1, total)
            if tenth > last[0]:
                last[0] = tenth
                say(f"{model}: {done:,} of {total:,} bytes")

        packed = client.models.download(model, Path(folder) / "weights.tar.gz", form=form, progress=tell)
        unpacked = Path(folder) / "weights"
        with tarfile.open(packed) as archive:
            archive.extractall(unpacked, filter="data")
        return unpacked.rename(to)
