"""The placement against trying every one, its laws, and how long it takes at the size of an 80-layer model."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_base.errors import BadInput, NoFeasiblePlan
from search.placement import COMPUTING, EVERYTHING, Asked, Part, Placement, Tier, place, priced

MB, GB = 1e6, 1e9
WEIGHTS = frozenset({"weights"})

sizes = st.floats(1.0, 50.0)


@st.composite
def problems(draw: st.DrawFn, *, whole: bool | None = None, most_parts: int = 3, most_count: int = 4) -> Asked:
    """Draw what may be placed: parts of any size, two or three tiers that hold it one way or another."""
    parts = tuple(
        Part(
            name=f"part {number}", count=draw(st.integers(1, most_count)), weight_bytes=draw(sizes) * MB,
            cache_bytes=draw(sizes) * MB / 10, cache_read_bytes=draw(sizes) * MB / 20, cache_new_bytes=draw(sizes) * 1e3,
            state_bytes=draw(sizes) * 1e4, read_s=draw(sizes) * 1e-4, flop_s=draw(sizes) * 1e-5, each_s=draw(sizes) * 1e-6,
            fixed_s=draw(sizes) * 1e-6,
        )
        for number in range(draw(st.integers(1, most_parts)))
    )  # fmt: skip
    everything = sum(part.count * part.weight_bytes for part in parts)
    tiers = [Tier(name="device", capacity_bytes=draw(st.floats(0.2, 1.5)) * everything + 20 * MB)]
    tiers += [
        Tier(
            name=name, capacity_bytes=capacity, read_bytes_per_s=draw(st.floats(0.5, 30)) * GB,
            write_bytes_per_s=draw(st.floats(0.5, 30)) * GB, holds=draw(st.sampled_from((EVERYTHING, WEIGHTS))),
        )
        for name, capacity in draw(
            st.sampled_from(((("disk", math.inf),), (("host", 0.5 * everything + 200 * MB), ("disk", math.inf))))
        )
    ]  # fmt: skip
    return Asked(
        parts=parts, tiers=tuple(tiers), fixed_bytes=draw(sizes) * 1e4, each_bytes=draw(sizes) * 1e3,
        whole=draw(st.booleans()) if whole is None else whole, overlapped=draw(st.booleans()),
    )  # fmt: skip


def answer(asked: Asked, batches: tuple[int, ...] = (1,)) -> Placement | None:
    try:
        return place(asked, batches)
    except NoFeasiblePlan:
        return None


def keeps(asked: Asked, found: Placement) -> bool:
    """Whether every tier's budget is kept, to the rounding of sums."""
    return all(found.used_bytes[tier.name] <= tier.capacity_bytes * (1 + 1e-9) for tier in asked.tiers)


# ---------------------------------------------------------------- laws


@settings(max_examples=60, deadline=None)
@given(problems(), st.sets(st.sampled_from((1, 2, 4, 8)), min_size=1))
def test_everything_is_somewhere_and_budgets_are_kept(asked: Asked, batches: set[int]) -> None:
    if (found := answer(asked, tuple(batches))) is None:
        return
    assert found.batch in batches
    assert keeps(asked, found)
    for what, shares in (("weights", found.weights), ("cache", found.cache), ("states", {"": found.states})):
        for each in shares.values():
            assert sum(each.values()) == pytest.approx(1)
            assert all(0 <= share <= 1 for share in each.values())
            assert all(not each[tier.name] for tier in asked.tiers if what not in tier.holds)
    if asked.whole:
        for part in asked.parts:
            counts = [share * part.count for share in found.weights[part.name].values()]
            assert counts == pytest.approx([round(count) for count in counts])


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(1, 3))
def test_more_memory_is_never_slower(asked: Asked, more: float) -> None:
    found = answer(asked)
    device, *others = asked.tiers
    roomier = replace(asked, tiers=(replace(device, capacity_bytes=more * device.capacity_bytes), *others))
    if found is not None:
        again = answer(roomier)
        assert again is not None
        assert again.step_s <= found.step_s * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(1, 4))
def test_a_faster_link_and_a_smaller_load_are_never_slower(asked: Asked, faster: float) -> None:
    if (found := answer(asked)) is None:
        return
    tiers = tuple(replace(tier, read_bytes_per_s=faster * tier.read_bytes_per_s) for tier in asked.tiers)
    assert place(replace(asked, tiers=tiers)).step_s <= found.step_s * (1 + 1e-5)
    parts = tuple(replace(part, weight_bytes=part.weight_bytes / faster) for part in asked.parts)
    assert place(replace(asked, parts=parts)).step_s <= found.step_s * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_what_fits_is_on_the_device_and_only_computes(asked: Asked) -> None:
    device, *others = asked.tiers
    roomy = replace(asked, tiers=(replace(device, capacity_bytes=math.inf), *others))
    found = place(roomy, (2,))
    assert all(shares["device"] == pytest.approx(1) for shares in (*found.weights.values(), *found.cache.values()))
    assert found.step_s == pytest.approx(sum(part.count * part.compute_s(2) for part in asked.parts))
    assert found.bound == COMPUTING


@settings(max_examples=40, deadline=None)
@given(problems(), st.sets(st.sampled_from((1, 2, 4, 8)), min_size=2))
def test_the_batch_is_the_one_with_the_least_time_for_each_token(asked: Asked, batches: set[int]) -> None:
    each = [found for batch in batches if (found := answer(asked, (batch,)))]
    found = answer(asked, tuple(batches))
    assert (found is None) == (not each)
    if found is not None:
        assert found.s_per_token == min(other.s_per_token for other in each)


@settings(max_examples=40, deadline=None)
@given(problems(whole=False))
def test_equal_parts_need_no_variables_of_their_own(asked: Asked) -> None:
    apart = tuple(
        replace(part, name=f"{part.name}.{number}", count=1) for part in asked.parts for number in range(part.count)
    )
    found, again = answer(asked), answer(replace(asked, parts=apart))
    assert (found is None) == (again is None)
    if found is not None and again is not None:
        assert again.step_s == pytest.approx(found.step_s, rel=1e-5)


# ---------------------------------------------------------------- what is best


def every_whole(asked: Asked, batch: int):
    """Yield every placement of whole parts, all else on the device."""
    first, *others = (tier.name for tier in asked.tiers)
    here = {first: 1.0, **dict.fromkeys(others, 0.0)}
    names = [first, *others]
    counts = [
        [c for c in itertools.product(range(part.count + 1), repeat=len(names)) if sum(c) == part.count]
        for part in asked.parts
    ]
    for chosen in itertools.product(*counts):
        weights = {
            part.name: {name: n / part.count for name, n in zip(names, each, strict=True)}
            for part, each in zip(asked.parts, chosen, strict=True)
        }
        yield priced(asked, batch, weights, {part.name: here for part in asked.parts}, here)


@settings(max_examples=60, deadline=None)
@given(problems(whole=True, most_parts=2, most_count=4), st.sampled_from((1, 4)))
def test_whole_parts_equal_trying_every_placement(asked: Asked, batch: int) -> None:
    asked = replace(asked, tiers=(asked.tiers[0], *(replace(tier, holds=WEIGHTS) for tier in asked.tiers[1:])))
    fitting = [found.step_s for found in every_whole(asked, batch) if keeps(asked, found)]
    found = answer(asked, (batch,))
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.step_s == pytest.approx(min(fitting), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(problems(whole=False, most_parts=2, most_count=3), st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_no_other_shares_are_better(asked: Asked, drawn: list[float]) -> None:
    found = answer(asked)
    if found is None:
        return
    numbers = iter(drawn)

    def shares(what: str) -> dict[str, float]:
        raw = {tier.name: next(numbers, 0.5) * (what in tier.holds) for tier in asked.tiers}
        whole = sum(raw.values())
        return {name: value / whole for name, value in raw.items()} if whole else dict(found.states)

    weights = {part.name: shares("weights") for part in asked.parts}
    other = priced(asked, 1, weights, found.cache, found.states)
    assert not keeps(asked, other) or other.step_s >= found.step_s * (1 - 1e-5)


def test_by_hand() -> None:
    # 10 parts of 1 GB, 10 ms each from memory; room for 6 GB: 4 GB must come from a disk of 2 GB/s.
    part = Part(name="layer", count=10, weight_bytes=1 * GB, read_s=0.01)
    tiers = (
        Tier(name="memory", capacity_bytes=6 * GB),
        Tier(name="disk", capacity_bytes=1e12, read_bytes_per_s=2 * GB),
    )
    split = place(Asked(parts=(part,), tiers=tiers))
    # shares: 10 (1 - s) + 2 s = 6, so half of each part is read in 0.25 s
    assert split.weights["layer"]["disk"] == pytest.approx(0.5)
    assert split.step_s == pytest.approx(2.5)
    assert split.bound == "reading disk"
    whole = place(Asked(parts=(part,), tiers=tiers, whole=True))
    # whole parts: 4 resident and 2 in transit
    assert whole.weights["layer"] == {"memory": 0.4, "disk": 0.6}
    assert whole.step_s == pytest.approx(3.0)
    assert whole.used_bytes["memory"] == pytest.approx(6 * GB)
    one_by_one = place(Asked(parts=(part,), tiers=tiers, whole=True, overlapped=False))
    assert one_by_one.step_s == pytest.approx(3.1)
    fast = replace(tiers[1], read_bytes_per_s=200 * GB)
    hidden = place(Asked(parts=(part,), tiers=(tiers[0], fast), whole=True))
    assert hidden.step_s == pytest.approx(0.1) and hidden.bound == COMPUTING


def test_a_larger_batch_shares_one_read_until_its_cache_takes_the_room() -> None:
    part = Part(name="layer", count=10, weight_bytes=1 * GB, cache_bytes=0.02 * GB, read_s=0.01)
    tiers = (
        Tier(name="memory", capacity_bytes=6 * GB),
        Tier(name="disk", capacity_bytes=1e12, read_bytes_per_s=2 * GB, holds=WEIGHTS),
    )
    asked = Asked(parts=(part,), tiers=tiers, whole=True)
    found = place(asked, (1, 2, 4, 8, 16, 32))
    # of 32 the cache alone takes 6.4 GB; of 16 it takes 3.2, which leaves no part resident
    assert found.batch == 16 and found.weights["layer"]["disk"] == 1.0
    assert found.s_per_token == pytest.approx(5.0 / 16)
    quick = place(replace(asked, most_step_s=4.0), (1, 2, 4, 8, 16, 32))
    assert quick.step_s <= 4.0 and quick.batch == 8


def test_eighty_layers_on_three_tiers_take_less_than_a_second() -> None:
    parts = (
        Part(name="attention", count=80, weight_bytes=302 * MB, cache_bytes=8 * MB, cache_read_bytes=6 * MB, cache_new_bytes=4e3,
             state_bytes=16e3, read_s=2e-4, flop_s=2e-6),
        Part(name="ffn", count=80, weight_bytes=1_409 * MB, state_bytes=16e3, read_s=9e-4, flop_s=9e-6),
    )  # fmt: skip
    tiers = (
        Tier(name="device", capacity_bytes=24 * GB),
        Tier(name="host", capacity_bytes=64 * GB, read_bytes_per_s=25 * GB, write_bytes_per_s=25 * GB),
        Tier(name="disk", capacity_bytes=1e12, read_bytes_per_s=3 * GB, write_bytes_per_s=1 * GB),
    )
    for whole in (False, True):
        asked = Asked(parts=parts, tiers=tiers, fixed_bytes=3 * GB, each_bytes=1 * MB, whole=whole)
        began = time.process_time()
        found = place(asked, (1, 4, 16, 64))
        assert time.process_time() - began < 1.0
        assert keeps(asked, found)
        assert found.bound == "reading disk"
        assert all(shares["disk"] < 1 for shares in found.weights.values())


# ---------------------------------------------------------------- refusals


def test_what_does_not_fit_is_told_with_what_is_short() -> None:
    part = Part(name="layer", count=2, weight_bytes=1 * GB)
    with pytest.raises(NoFeasiblePlan, match=r"a batch of 1 takes 1\.86 GiB.*memory 954 MiB: short by 954 MiB"):
        place(Asked(parts=(part,), tiers=(Tier(name="memory", capacity_bytes=1 * GB),)))
    both = (Tier(name="memory", capacity_bytes=0.5 * GB), Tier(name="disk", capacity_bytes=1e12, read_bytes_per_s=1e9))
    with pytest.raises(NoFeasiblePlan, match="in transit"):
        place(Asked(parts=(part,), tiers=both, whole=True))


@pytest.mark.parametrize(
    ("asked", "batches"),
    [
        (Asked(parts=(), tiers=(Tier(name="memory", capacity_bytes=1.0),)), (1,)),
        (Asked(parts=(Part(name="a", count=1, weight_bytes=1.0),), tiers=()), (1,)),
        (Asked(parts=(Part(name="a", count=1, weight_bytes=1.0),), tiers=(Tier(name="m", capacity_bytes=9.0),)), (0,)),
        (Asked(parts=(Part(name="a", count=0, weight_bytes=1.0),), tiers=(Tier(name="m", capacity_bytes=9.0),)), (1,)),
        (Asked(parts=(Part(name="a", count=1, weight_bytes=math.nan),), tiers=(Tier(name="m", capacity_bytes=9.0),)), (1,)),
        (
            Asked(parts=(Part(name="a", count=1, weight_bytes=1.0),), tiers=(Tier(name="m", capacity_bytes=1.0, read_bytes_per_s=0.0),)),
            (1,),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(asked: Asked, batches: tuple[int, ...]) -> None:
    with pytest.raises(BadInput):
        place(asked, batches)
