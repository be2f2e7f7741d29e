"""One page per stream: what happened, told from the figures of ``dynamic-STREAM-PROFILE.json``.

:func:`pages` turns a folder of results into Markdown, standalone HTML and SVG files.
"""

from fedkola.evaluation.page.written import explain, pages

__all__ = ["explain", "pages"]
