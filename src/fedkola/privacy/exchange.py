"""One question while a site answers it: its noise key, and what the answer costs."""

import hashlib
from dataclasses import dataclass, field

from fedkola.privacy.accounting import Cost


@dataclass(slots=True, kw_only=True)
class Exchange:
    """``key`` is the one that all noise of the answer is drawn from; ``costs`` fills up while the
    answer is computed."""

    key: bytes
    costs: list[Cost] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the account calls this exchange; it says nothing about the key."""
        return hashlib.sha256(b"fedkola/exchange/1\0" + self.key).hexdigest()[:32]
