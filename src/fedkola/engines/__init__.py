"""Where sites live. ``ENGINES`` is a closed table of the names a plan may use."""

from collections.abc import Mapping

from fedkola.engines.in_process import InProcess

ENGINES: Mapping[str, type[InProcess]] = {"in_process": InProcess}
