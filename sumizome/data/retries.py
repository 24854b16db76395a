"""Trying again what a network may have broken: exponential backoff with full jitter, bounded in count and in time.

Owns the waiting and what may be said of a failure: `redacted` keeps credentials out of every message. Which failures
are worth another attempt is the caller's to say. Source of the jitter: AWS Architecture Blog, "Exponential Backoff And
Jitter" (full jitter: uniform between 0 and the exponential bound).
"""

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["GaveUp", "RetryPolicy", "redacted"]

Result = TypeVar("Result")

_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_SECRET_PATTERNS = (
    re.compile(r"(?<=://)[^/\s@]+@"),  # user:password@ of a URL
    re.compile(r"\?[^\s'\"<>)]*"),  # a query string: a presigned URL is a key
    re.compile(r"(?i)\b(?:x-amz-[\w-]+|awsaccesskeyid|signature|credential|authorization)\b\s*[=:]\s*[^\s,;&'\"<>)]+"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"),
)


class GaveUp(Exception):
    """The last attempt failed too. `attempts` were made in `seconds`; `cause` is what the last one met."""

    def __init__(self, attempts: int, seconds: float, cause: Exception) -> None:
        super().__init__(f"{attempts} attempts in {seconds:.0f} s")
        self.attempts, self.seconds, self.cause = attempts, seconds, cause


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long an action is tried."""

    attempts: int = 8
    """At most, the first included."""
    total_s: float = 300.0
    """No attempt begins later than this after the first, in seconds."""
    first_s: float = 0.2
    """Bound of the first wait; it doubles each time. The wait is uniform between 0 and the bound."""
    longest_s: float = 20.0
    """The bound does not grow beyond this."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    """Silence of a connection that counts as a failure."""

    def run(
        self,
        action: Callable[[], Result],
        is_transient: Callable[[Exception], bool],
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> Result:
        """What `action` returns, tried again while its failure is transient and the bounds allow.

        Raises: GaveUp after the last attempt; at once, whatever is not transient.
        """
        started = clock()
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as error:
                if not is_transient(error):
                    raise
                wait = random.uniform(0, min(self.longest_s, self.first_s * 2 ** (attempt - 1)))
                if attempt == self.attempts or clock() + wait - started > self.total_s:
                    raise GaveUp(attempt, clock() - started, error) from error
            sleep(wait)
        raise ValueError(f"attempts is {self.attempts}; it must be 1 or more")


def redacted(text: str) -> str:
    """`text` without credentials: this process's own by value, others' by the forms in which they come."""
    for variable in _SECRET_VARIABLES:
        if len(secret := os.environ.get(variable, "")) >= 4:
            text = text.replace(secret, "***")
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub("***", text)
    return text
