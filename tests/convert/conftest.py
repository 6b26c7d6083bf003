from pathlib import Path

import pytest
from golden_copies import CHECKPOINTS, GOLDEN

from convert.from_hf import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Both golden folders as from_hf makes them; not to be changed."""
    place = tmp_path_factory.mktemp("converted")
    for name in CHECKPOINTS:
        convert(GOLDEN / name, place / name)
    return {name: place / name for name in CHECKPOINTS}
