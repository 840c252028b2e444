"""What the studio is told when it is started."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusion_kit.ledger.place import home

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class StudioConfig:
    """
    Attributes:
        models: folders of models, models themselves, or hub ids; the first is loaded first.
        controls: folders of controls, or controls themselves.
        output: where its pictures are written, in a folder for each day.
        host, port: where it listens.
        users: file of users with hashed passwords, or None: everybody who reaches it may use it.
        hosts: names beside the loopback's under which it may be reached.
        root_path: under which a proxy shows it.
        queue: jobs that wait or run at most.
        upload: megabytes of a picture at most.
        megapixels: of a picture that is made at most.
        cells: pictures of a comparison at most.
        device, dtype, optimize, engine, low_memory: as of `diffusion-kit generate`.
        history: whether pictures are written to the ledger.
    """

    models: tuple[str, ...] = ("default",)
    controls: tuple[str, ...] = ()
    output: Path = field(default_factory=lambda: home() / "studio")
    host: str = "127.0.0.1"
    port: int = 7860
    users: Path | None = None
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    queue: int = 32
    upload: float = 20.0
    megapixels: float = 4.0
    cells: int = 36
    device: str | None = None
    dtype: str | None = None
    optimize: str | None = None
    engine: str | None = None
    low_memory: bool = False
    history: bool = True

    def check(self) -> None:
        """
        Raises:
            ValueError: what does not go together, or would be open to anybody.
        """
        if self.host not in LOOPBACK and self.users is None:
            raise ValueError(
                f"--host {self.host} can be reached from other machines: add --auth USERS, a file that "
                "`diffusion-kit studio adduser USERS NAME` writes"
            )
        for name, value in (("queue", self.queue), ("upload", self.upload), ("megapixels", self.megapixels)):
            if value <= 0:
                raise ValueError(f"--{name} is {value}; it must be more than 0")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; it must be 0 to 65535")
        for place in self.controls:
            if not Path(place).exists():
                raise ValueError(f"--controls {place}: there is no such folder or file")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"--root-path is {self.root_path!r}; it must begin with /")

    @property
    def is_shared(self) -> bool:
        """Whether others than the one at the machine may be on its pages: it has users, or is behind a proxy."""
        return self.users is not None or bool(self.hosts or self.root_path)

    @property
    def pictures(self) -> Path:
        return self.output / "pictures"

    @property
    def inputs(self) -> Path:
        return self.output / "inputs"

    @property
    def shown(self) -> list[Path]:
        """Folders whose files pages may show as they are. Uploads are in none of them."""
        return [self.output / name for name in ("pictures", "shown", "thumbs", "zips")]

    def is_own(self, path: str | Path) -> bool:
        """Whether a picture is the studio's: one that it made or keeps."""
        return any(Path(path).resolve().is_relative_to(own.resolve()) for own in (self.inputs, self.pictures))
