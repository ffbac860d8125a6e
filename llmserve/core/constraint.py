"""What keeps an answer to a grammar, as the scheduler sees it."""

from __future__ import annotations

from typing import Protocol


class TokenConstraint(Protocol):
    """Follows one request's answer. Which tokens it allows next is for whoever made it to ask."""

    def accept(self, token_id: int) -> bool:
        """Take the next token of the answer.

        Returns:
            Whether the answer is complete: nothing may follow.

        Raises:
            InvalidRequestError: The token is not allowed here.
        """
        ...
