"""What the HTTP server is started with."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.config import check_at_least

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_keys: Bearer tokens that clients may show; with none the server asks for none.
        max_body_bytes: Larger request bodies are refused, unread.
        keep_alive_s: A stream gets a comment so often, and its headers after so long at the latest.
        drain_timeout_s: On SIGTERM running requests may take so long to end.
        request_timeout_s: Most that a request may take, and its timeout if it sets none; None: no
            such limit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * MIB
    keep_alive_s: float = 15.0
    drain_timeout_s: float = 30.0
    request_timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_at_least("max_body_bytes", self.max_body_bytes, 1)
        check_at_least("keep_alive_s", self.keep_alive_s, 0.01)
        check_at_least("drain_timeout_s", self.drain_timeout_s, 0)
        check_at_least("request_timeout_s", self.request_timeout_s, 0.001)
