"""Options of a server."""

import os
from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import natural_int, non_empty, number_between, option, positive_int


KEY_VARIABLE = "MINIGPT3D_API_KEY"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class ServeOptions:
    """Where a server listens, what it may read, and what its clients may ask for."""

    host: str = option("address to listen on; 0.0.0.0 is every network", default="127.0.0.1", type=non_empty)
    port: int = option("port to listen on; 0 for a free one", default=8000, type=natural_int)
    api_key: str | None = option(
        f"key that clients must send (default: the variable {KEY_VARIABLE}, else none is needed)",
        default=None,
        metavar="KEY",
    )
    root: Path | None = option("folder whose files clients may name (default: none)", default=None, metavar="FOLDER")
    batch_size: int | None = option(
        "requests that the model answers at once (default: 16 on a CPU, 64 on an accelerator)",
        default=None,
        type=positive_int,
        metavar="N",
    )
    batch_wait: float = option(
        "milliseconds that a request waits for others to share its batch",
        default=10,
        type=number_between(0, 10_000),
        metavar="MS",
    )
    max_requests: int = option(
        "requests in progress; further ones are refused with status 429", default=64, type=positive_int, metavar="N"
    )
    max_body: float = option(
        "megabytes of a request, and of a file that it links to",
        default=64,
        type=number_between(0.001, 100_000),
        metavar="MB",
    )
    timeout: float = option(
        "seconds for a request, from the end of its headers to its answer",
        default=120,
        type=number_between(0.1, 1e6),
        metavar="SECONDS",
    )

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach the server."""
        return self.host in LOCAL_HOSTS

    @property
    def key(self) -> str | None:
        """What clients must send, if anything."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body * 1e6)
