"""``python -m rem_atari`` is the command ``rem-atari``."""

from __future__ import annotations

import sys

from rem_atari.cli import main

sys.exit(main())
