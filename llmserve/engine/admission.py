"""What an engine can never serve, told by what is known of it on either side of the process."""

from __future__ import annotations

from llmserve.core import admission
from llmserve.core.request import Request
from llmserve.engine.engine import EngineInfo


def check_request(request: Request, info: EngineInfo) -> None:
    """Refuse a request that does not fit the engine; see ``core.admission.check_request``."""
    admission.check_request(
        request,
        max_seq_len=info.max_seq_len,
        max_kv_tokens=info.kv_cache_tokens,
        vocab_size=info.vocab_size,
    )
