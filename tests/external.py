"""Where the optional outside data is: tokenizers, essays, published head scores. Tests that use it skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("LCCP_EXTERNAL", Path(__file__).resolve().parents[2] / "shared" / "external"))


def external(relative: str) -> Path:
    """Path of a piece of outside data; skips the test, saying so, where it is not there."""
    path = ROOT / relative
    if not path.exists():
        pytest.skip(f"outside data {relative} not found under $LCCP_EXTERNAL or ../shared/external")
    return path
