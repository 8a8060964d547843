"""What `benchmarks/video.py` says of windows is what the program makes of them."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pnp_batch.clips import Clip
from pnp_batch.manifest import VideoSpec
from pnp_batch.media.video import Footage, Timing

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from video import _overlaps


@pytest.mark.parametrize(
    ("count", "seams"), [(36, []), (40, []), (41, [range(31, 40)]), (88, [range(31, 40), range(63, 72)])]
)
def test_seams_are_where_two_windows_hold_a_frame(count: int, seams: list[range]) -> None:
    footage = Footage(Timing(tuple(range(count)), count, Fraction(1, 24)), (64, 64))
    clip = Clip(Path("shots"), VideoSpec(), footage, range(count))
    found = _overlaps(list(clip.windows(overlapping=True)))
    assert len(found) == count - 1
    assert np.flatnonzero(found).tolist() == [place for seam in seams for place in seam]
