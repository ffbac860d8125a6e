"""A batch job to be killed: ``python killable_job.py DIRECTORY SEED``.

Every line that is handed to the engine is noted in ``submissions.log`` before anything else.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

from llmserve.batch.format import JsonObject, Response
from llmserve.batch.job import run_job
from tests.batch.jobs import FakeResponder, make_job


class SlowResponder(FakeResponder):
    """Takes 0 to 8 ms a line; every seventh is refused with a 400."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__()
        self._log = os.open(directory / "submissions.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._random = random.Random(seed)

    async def respond(self, url: str, body: JsonObject, request_id: str) -> Response:
        name = body["messages"][0]["content"]  # type: ignore[index]
        os.write(self._log, f"{name}\n".encode())
        await asyncio.sleep(self._random.random() * 0.008)
        if name.endswith("7"):
            return Response(400, {"error": {"message": name}})
        return await super().respond(url, body, request_id)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    asyncio.run(run_job(make_job(directory), SlowResponder(directory, int(sys.argv[2]))))
