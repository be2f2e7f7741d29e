"""The adversary: what each observer of a run saw, and attacks on exactly that.

``ATTACKS`` is a closed table: every attack that an audit tries, in the order tried. A class may say
which ``targets`` it is for (of "single", "sum" and "model"; by default the first two), and make a
smaller self with ``quick()``.
"""

from collections.abc import Mapping
from typing import Any

from fedkola.audit.canary import CanaryExposure
from fedkola.audit.checks import Checks
from fedkola.audit.dager import Dager
from fedkola.audit.embedding_rows import EmbeddingRows
from fedkola.audit.membership import Membership
from fedkola.audit.patches import Patches
from fedkola.audit.presence import Presence
from fedkola.audit.sizes import Sizes

ATTACKS: Mapping[str, type[Any]] = {
    "dager": Dager,
    "embedding_rows": EmbeddingRows,
    "patches": Patches,
    "presence": Presence,
    "membership": Membership,
    "canary": CanaryExposure,
    "checks": Checks,
    "sizes": Sizes,
}
