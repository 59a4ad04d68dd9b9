"""Times of matrices by shape and storage: all there, and in the order of what they do."""

from __future__ import annotations

import pytest
from tiny_sessions import session_of, tiny_folder

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._choices import EVERYTHING
from knowledge_base.techniques._latency import decode_step, least_seconds, matrix_seconds


def test_every_shape_and_option_is_timed():
    shapes = [(1024, 1024), (64, 72), (1024, 1024)]
    found = matrix_seconds(session_of(tiny_folder()), shapes, EVERYTHING, 64, layers=4)
    assert found.keys() == {(1024, 1024), (64, 72)}
    assert found[1024, 1024].keys() == {*map(str, EVERYTHING), "16"}
    assert found[64, 72].keys() <= {"8", "8 keep 0.6", "8 keep 0.4", "16", "removed"}  # no group of weights divides 72
    large = found[1024, 1024]
    assert all(0 < seconds < 1 for seconds in large.values())
    assert large["2"] > 2 * large["4"]  # no kernel: unpacked at every step
    assert large["4 zeros 0.5"] < large["2"] / 2  # as it computes once it is loaded: 4 bits
    assert large["removed"] < large["2"]
    assert large["16"] > found[64, 72]["16"]


def test_a_step_is_timed_as_one_of_several():
    session = session_of(tiny_folder())
    run, count = decode_step(session)
    times = least_seconds({"step": (run, count), "steps": (run, 1)}, session, "timing")
    assert 1e-5 < times["step"] < 1
    assert 0.3 * count < times["steps"] / times["step"] < 3 * count
    with pytest.raises(CandidateFailed, match="keeps no cache"):
        decode_step(session_of(tiny_folder("mamba")))
