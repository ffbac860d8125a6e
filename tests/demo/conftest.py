"""Makes the demo checkpoint's scripts importable, which are no part of the package."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
sys.path.insert(0, str(CHECKPOINT))
