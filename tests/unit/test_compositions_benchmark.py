"""The benchmark of compositions: volumes and dominance by hand, the table, and what a run of it asks for."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import compositions as co
from benchmarks.compositions import REFERENCE, SIZE, SPEED, Point
from planner import spec as specs

QUALITY = co.QUALITY


def point(plan: str = "p", steps: int = 1, size: float = 0.5, speed: float = 0.5, loss: float = 0.1, **more) -> Point:
    """Return a point that loses `loss` on every one of eight windows, but for a ripple."""
    ripple = more.pop("ripple", 0.0)
    nats = tuple(loss + ripple * (-1) ** i for i in range(8))
    width = more.pop("width", 0.01)
    return Point(
        plan=plan, steps=steps, size=size, speed=speed, speed_low=speed - width, speed_high=speed + width,
        perplexity=1 + loss, loss_nats=nats, bytes=int(size * 1000), peak_memory_bytes=1, tokens_per_s=1.0, build_s=1.0,
    )  # fmt: skip


def test_volume_by_hand():
    half = point(size=0.5, speed=0.25, loss=0.1)
    assert co.volume([half], (SIZE, QUALITY)) == pytest.approx(0.5 * 0.5)
    assert co.volume([half], (SPEED, QUALITY)) == pytest.approx(0.75 * 0.5)
    assert co.volume([half], (SIZE, SPEED, QUALITY)) == pytest.approx(0.5 * 0.75 * 0.5)
    two = [half, point(size=0.25, speed=1.0, loss=0.15)]
    assert co.volume(two, (SIZE, QUALITY)) == pytest.approx(0.5 * 0.5 + 0.25 * 0.25)
    assert co.volume([], (SIZE, QUALITY)) == 0.0
    assert co.volume([point(size=1.5)], (SIZE, QUALITY)) == 0.0, "larger than the unchanged model"
    assert co.volume([point(loss=0.3)], (SIZE, QUALITY)) == 0.0, "beyond the budget"


def test_volume_ends_at_the_ideal():
    better = point(size=0.5, loss=-0.01)
    assert co.volume([better], (SIZE, QUALITY)) == pytest.approx(0.5), "better than unchanged counts as unchanged"


def test_the_front_leaves_out_what_is_beyond_the_reference():
    a, b, c, d = point("a", size=0.2, loss=0.1), point("b", size=0.3, loss=0.05), point("c", size=0.3, loss=0.06), point("d", size=0.1, loss=0.5)  # fmt: skip
    assert [p.plan for p in co.front_of([b, c, d, a], (SIZE, QUALITY))] == ["a", "b"]
    assert REFERENCE[QUALITY] < d.perplexity
    assert co.front_of([d], (SIZE, QUALITY)) == []


@pytest.mark.parametrize(
    ("one", "other", "figures", "surely"),
    [
        (point(size=0.4, loss=0.05), point(size=0.5, loss=0.1), True, True),
        (point(size=0.5, loss=0.1), point(size=0.5, loss=0.1), False, False),  # equal
        (point(size=0.6, loss=0.01), point(size=0.5, loss=0.1), False, False),  # larger
        (point(size=0.4, loss=0.12), point(size=0.5, loss=0.1), False, False),  # surely worse
        (point(size=0.4, loss=0.101, ripple=0.05), point(size=0.5, loss=0.1), False, False),  # worse, if only by noise
        (point(size=0.5, loss=0.099, ripple=0.05), point(size=0.5, loss=0.1), True, False),  # better only by noise
    ],
)
def test_dominance_at_the_same_size(one, other, figures, surely):
    assert co.dominates(one, other, SIZE, surely=False) is figures
    assert co.dominates(one, other, SIZE, surely=True) is surely


def test_dominance_at_the_same_speed_honours_intervals():
    other = point(speed=0.5, loss=0.1)
    assert not co.dominates(point(speed=0.51, loss=0.05), other, SPEED, surely=False)
    assert co.dominates(point(speed=0.49, loss=0.05), other, SPEED, surely=True), "surely better, and not slower"
    assert co.dominates(point(speed=0.49, loss=0.1), other, SPEED, surely=False)
    assert not co.dominates(point(speed=0.49, loss=0.1), other, SPEED, surely=True), "faster only by noise, as good"


def test_the_unchanged_model_loses_nothing():
    unchanged = Point(**{**asdict(point(steps=0, size=1, speed=1, loss=0.0)), "loss_nats": ()})
    assert co.loses_more(point(loss=0.1), unchanged) == 1
    assert co.loses_more(unchanged, point(loss=0.1)) == -1
    assert co.loses_more(unchanged, unchanged) == 0


def test_only_compositions_count_as_such():
    single = point("s", size=0.3, speed=0.3, loss=0.1)
    found = co.compared([single], [point("better", steps=1, size=0.2, speed=0.2, loss=0.05)])
    assert found["size"]["dominated"] == 0
    assert found["volume"]["size"]["compositions"] > found["volume"]["size"]["singles"]
    found = co.compared([single], [point("better", steps=2, size=0.2, speed=0.2, loss=0.05)])
    assert (found["size"]["singles_on_front"], found["size"]["dominated"], found["size"]["surely_dominated"]) == (
        1,
        1,
        1,
    )
    assert found["speed"]["surely_dominated"] == 1
    quarter, fifth, sixth = found["size"]["best"][1:4]
    assert (quarter["singles"], quarter["compositions"]) == (None, 1.05)
    assert fifth["compositions"] == 1.05
    assert sixth["compositions"] is None


def kept() -> dict:
    singles = [point("as it came", steps=0, size=1.0, speed=1.0, loss=0.0), point("transformers: one", size=0.3)]
    both = [point("as it came", steps=0, size=1.0, speed=1.0, loss=0.0), point("transformers: one + two", steps=2, size=0.2, loss=0.05)]  # fmt: skip
    runs = {"singles": singles, "compositions": both}
    return {"models": {"tiny-lm": {arm: {"points": [asdict(p) for p in some], "failed": []} for arm, some in runs.items()}, "gpt2": {"singles": {}}}}  # fmt: skip


def test_the_table_tells_both_sides_and_only_whole_models():
    text = co.as_markdown(json.loads(json.dumps(kept())))
    assert "| tiny-lm | 2 / 2 | 0.350 / **0.600** |" in text
    assert "1 of 1, surely 1" in text
    assert "| tiny-lm, compositions | transformers: one + two | 0.200 | 0.500 | 1.0500 | 1 s |" in text
    assert "gpt2" not in text


def test_both_runs_ask_the_same_but_for_the_length_of_plans():
    singles, both = (co.spec_of(co.SHIPPED, arm) for arm in ("singles", "compositions"))
    assert singles.search.max_steps == 1
    assert both.search.max_steps is None
    assert replace(singles.search, max_steps=None) == both.search
    assert replace(singles, search=both.search) == both
    assert singles.calibration == specs.load(co.EXAMPLE).calibration
    assert singles.budgets[0].value == pytest.approx(REFERENCE[QUALITY] - 1)


def test_what_was_measured_otherwise_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(co, "RESULTS", tmp_path / "compositions.json")
    assert co.kept_before()["models"] == {}
    now = {**co.kept_before(), **kept()}
    co.RESULTS.write_text(json.dumps(now))
    assert set(co.kept_before()["models"]) == {"tiny-lm", "gpt2"}
    co.RESULTS.write_text(json.dumps({**now, "asked": {}}))
    assert co.kept_before()["models"] == {}
