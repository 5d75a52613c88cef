"""Files of every format with known content: colors as written, no color, or refused by name."""

import pytest
from point_cases import CASES, read_expected, what_is_seen


EXPECTED = read_expected()
LIBRARIES = {"draco": "DracoPy", "meshopt": "meshopt", "e57": "pye57"}


@pytest.mark.parametrize("name", EXPECTED)
def test_case(name):
    for part, library in LIBRARIES.items():
        if name.split(".")[0].endswith(part):
            pytest.importorskip(library)
    assert what_is_seen(CASES / name) == EXPECTED[name]
