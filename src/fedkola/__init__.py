"""fedkola keeps a foundation model's knowledge current across institutions that cannot share
their data.

Read in call order: ``cli``, ``plan``, ``server``, ``algorithms``, ``engines``, ``wire``,
``client``, ``knowledge``, ``training``. Nothing calls back up.
"""

__version__ = "0.1.0"
