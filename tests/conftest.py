"""Puts the project root on the import path, and reads the rows of the public generator where they are at hand."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLD = ROOT.parent / "shared" / "gold" / "forward.jsonl"
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def gold():
    """285 rows made by the public generator: op 2-20, three templates."""
    if not GOLD.exists():
        pytest.skip(f"the public rows are not here: no {GOLD.name} in {GOLD.parent.name}/ beside the project")
    with open(GOLD, encoding="utf-8") as f:
        return [json.loads(line) for line in f]
