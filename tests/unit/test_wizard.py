"""The wizard without a terminal: scripted answers lead through its screens, on a real tiny model with real predictions."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from knowledge_base.errors import BadInput
from knowledge_base.types import Value
from planner import machine
from planner import spec as specs
from planner.forecast import Forecast, known_machine
from planner.results import Rejection
from planner.wizard import answers as kept_answers
from planner.wizard import drawing, training
from planner.wizard.answers import Answers
from planner.wizard.conversation import Conversation, wait_for
from planner.wizard.screens import SCREENS, defaults
from planner.wizard.screens._screen import Screen, View
from planner.wizard.screens.budgets import contradictions
from planner.wizard.screens.model import is_hub_id, local_models
from planner.wizard.screens.review import as_yaml

NAMES = [screen.name for screen in SCREENS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a catalogue machine's store: what a person would start the wizard in."""
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("wizard")
    make_tiny_model(folder / "models" / "tiny")
    (folder / "own.txt").write_text("words " * 500, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def forecast(place: Path) -> Forecast:
    """One memory of what was read, so that each test need not look at the machine again."""
    return Forecast(place / ".leanplan", offline=True)


class Script:
    """Types lines one after the other and remembers every screen shown. When they run out, the person leaves."""

    def __init__(self, lines: list[str]) -> None:
        self.lines: Iterator[str] = iter(lines)
        self.seen: list[tuple[str, View, str]] = []
        self.told: list[str] = []

    def ask(self, screen: Screen) -> str:
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None

    def show(self, screen: Screen, view: View, *, step: int, steps: int, note: str, turned: int) -> None:
        self.seen.append((screen.name, view, note))

    @property
    def notes(self) -> list[str]:
        return [note for _, _, note in self.seen if note]

    @property
    def visited(self) -> list[str]:
        names = [name for name, _, _ in self.seen]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


@pytest.fixture
def sit_down(place: Path, forecast: Forecast, monkeypatch: pytest.MonkeyPatch):
    """Return what leads a scripted person through the wizard in `place`."""
    monkeypatch.chdir(place)

    def lead(*lines: str, start: str = "goal", answers: Answers | None = None) -> tuple[Conversation, Script]:
        models = local_models(Path())
        script = Script(list(lines))
        first = answers or replace(defaults(models)).with_key("workload", {"prompt_tokens": 32, "output_tokens": 8})
        conversation = Conversation(
            first, forecast, models, ask=script.ask, show=script.show, idle=lambda ready: wait_for(ready, 60),
            tell=script.told.append,
        )  # fmt: skip
        with contextlib.suppress(EOFError):
            conversation.lead(start)
        return conversation, script

    return lead


def test_enter_accepts_every_default_and_ends_in_a_valid_spec(sit_down) -> None:
    done, script = sit_down(*[""] * 9)
    assert script.visited == NAMES
    assert done.answers.parsed.model.source == "models/tiny"
    assert done.answers.then == "both"
    assert all(view.outlook is not None for _, view, _ in script.seen[-9:])


def test_a_default_workload_follows_a_short_context_and_a_chosen_one_does_not(sit_down) -> None:
    models = local_models(Path())
    done, _ = sit_down("", "", answers=defaults(models))
    workload = done.answers.parsed.workload
    assert workload.prompt_tokens + workload.output_tokens <= 256
    chosen = defaults(models).with_key("workload", {"prompt_tokens": 600, "output_tokens": 8})
    done, _ = sit_down("", "", answers=chosen)
    assert done.answers == chosen


def test_b_goes_back_and_more_explains(sit_down) -> None:
    _, script = sit_down("", "?", "b", "b", "", "")
    assert script.visited == ["goal", "model", "goal", "model", "machine"]


def test_answers_change_the_spec_and_the_prediction(sit_down) -> None:
    done, script = sit_down(
        "", "", "", "concurrency 2", "output 16", "", "loss 50 %", "", "tpot_p95 50 ms", start="goal"
    )
    spec = done.answers.parsed
    assert (spec.workload.concurrency, spec.workload.output_tokens) == (2, 16)
    budgets = {b.label: b for b in spec.budgets}
    assert budgets["quality_loss"].value == 0.5
    assert budgets["tpot_p95"].value == 0.05
    before, *_, after = [view.outlook for _, view, _ in script.seen if view.outlook]
    assert before.unchanged.values["latency_s"].mid < after.unchanged.values["latency_s"].mid


@pytest.mark.parametrize(
    ("screen", "line", "told"),
    [
        ("goal", "surf", "is not known here"),
        ("model", "nowhere", "neither a folder here nor a hub id"),
        ("machine", "h100-sx", "did you mean"),
        ("machine", "price cheap", "price for each hour"),
        ("workload", "promt 3", "did you mean `prompt`"),
        ("workload", "prompt -1", "whole number"),
        ("workload", "prompt", "needs a value"),
        ("quality", "loss lots", "share"),
        ("quality", "text missing.txt", "is not a file"),
        ("budgets", "speed 3", "is not known here"),
        ("budgets", "tpot 3", "unit missing"),
        ("budgets", "peak_memory_p95 1 GiB", "is not known here"),
        ("priorities", "tpot energy cost latency", "at most 3"),
        ("limits", "time soon", "time"),
        ("review", "file spec.txt", "ends in .yaml"),
        ("review", "file nowhere/spec.yaml", "no folder"),
    ],
)
def test_a_wrong_line_is_told_and_changes_nothing(sit_down, screen: str, line: str, told: str) -> None:
    done, script = sit_down(line, start=screen)
    assert told in script.notes[0]
    assert "\n" in script.notes[0], "a note ends with what to do"
    before = script.seen[0][1].answers
    assert done.answers == before
    assert done.screen == screen


@pytest.mark.parametrize(
    ("screen", "line", "key", "value"),
    [
        ("machine", "h100-sxm", "hardware", "h100-sxm"),
        ("machine", "price $0.35/h", "prices", {"machine": "$0.35/h"}),
        ("workload", "edge", "workload", {"prompt_tokens": 128, "output_tokens": 64, "concurrency": 1}),
        ("workload", "5", "workload", {"prompt_tokens": 128, "output_tokens": 64, "concurrency": 1}),
        ("quality", "text own.txt", "quality", {"data": "own.txt"}),
        ("quality", "2 %", "budgets", {"quality_loss": {"max": "2 %"}}),
        ("quality", "none", "budgets", {"quality_loss": {"max": "0 %"}}),
        ("quality", "loss none", "budgets", {"quality_loss": {"max": "0 %"}}),
        ("quality", "loss any", "budgets", None),
        ("budgets", "ttft <= 200 ms warn", "budgets", {"quality_loss": {"max": "5 %"}, "ttft_p50": {"max": "200 ms", "level": "warn"}}),
        ("budgets", "throughput 5 tokens/s", "budgets", {"quality_loss": {"max": "5 %"}, "throughput_p50": {"min": "5 tokens/s"}}),
        ("priorities", "energy, 2", "objectives", ["energy", "tpot_p50"]),
        ("limits", "plans 3", "search", {"effort": "quick", "max_measured": 3}),
        ("limits", "memory 4 GiB", "limits", {"memory": "4 GiB"}),
    ],
)  # fmt: skip
def test_a_line_sets_its_key(sit_down, screen: str, line: str, key: str, value: object) -> None:
    done, script = sit_down(line, start=screen)
    assert not script.notes
    assert done.answers.spec.get(key) == value


def test_a_contradiction_is_told_at_once_with_the_tightest_limit_that_works(sit_down) -> None:
    _, script = sit_down("tpot 1 us", start="budgets")
    view = script.seen[-1][1]
    (line,) = contradictions(view)
    assert line.startswith("✗ tpot_p50 ≤ 1 us is out of reach; tightest: `tpot_p50 ")
    offered = re.search(r"`(.*)`", line)
    assert offered
    _, script = sit_down("tpot 1 us", offered[1], start="budgets")
    view = script.seen[-1][1]
    assert contradictions(view) == []
    assert view.outlook and view.outlook.best


def test_a_budget_only_measuring_can_judge_is_taken_and_marked(sit_down) -> None:
    done, script = sit_down("agreement 95 %", "tpot 2x baseline", start="budgets")
    assert {b.label for b in done.answers.parsed.budgets} >= {"agreement", "tpot_p50"}
    view = script.seen[-1][1]
    assert contradictions(view) == []
    rows = {row[0]: row for row in SCREENS[5].grid(view).rows}
    assert rows["agreement"] == ("agreement", "?", "≥ 95 %", "?", "")
    assert rows["tpot_p50"][2] == "≤ 2x baseline"
    assert rows["tpot_p50"][4] == "✓"


def test_tightest_is_a_limit_one_may_type(sit_down) -> None:
    done, script = sit_down("tpot 1 us", "tpot tightest", start="budgets")
    assert contradictions(script.seen[-1][1]) == []
    (limit,) = [b for b in done.answers.parsed.budgets if b.metric == "tpot_s"]
    outlook = script.seen[-1][1].outlook
    reach = outlook.reach("tpot_s")
    assert reach.value <= limit.value <= 1.2 * reach.value


def test_limits_that_clash_with_each_other_are_both_named(sit_down) -> None:
    _, script = sit_down("loss any", start="quality")
    outlook = script.seen[-1][1].outlook
    smallest = outlook.reach("artefact_bytes")
    size, loss = smallest.value * 1.001, 1e-4
    if outlook.within().any() and outlook.estimate(smallest.plan).values["quality_loss_ratio"].mid <= loss:
        pytest.skip("the smallest plan of this model costs no quality, so the two do not clash")
    _, script = sit_down(f"artefact_size {size / 2**10:.4f} KiB", f"quality_loss {100 * loss} %", start="budgets")
    lines = contradictions(script.seen[-1][1])
    assert {re.search(r"✗ (\w+)", line)[1] for line in lines} == {"artefact_size", "quality_loss"}  # type: ignore[index]
    assert all("clashes with your other limits; tightest" in line for line in lines)


def test_a_prompt_longer_than_the_context_does_not_pass_the_workload_screen(sit_down) -> None:
    done, script = sit_down("prompt 1000000", "", "prompt 32", "", start="workload")
    assert any("context" in note for note in script.notes)
    assert script.visited == ["workload", "quality"]
    assert done.answers.parsed.workload.prompt_tokens == 32


def test_a_model_that_cannot_be_read_does_not_pass_the_model_screen(sit_down, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{", encoding="utf-8")
    _, script = sit_down(str(broken), "", start="model")
    assert script.visited == ["model"]
    assert script.notes
    assert script.seen[-1][1].problem is not None


@pytest.mark.parametrize("goal", ["finetune", "pretrain"])
def test_a_goal_that_cannot_be_run_says_so_and_leads_to_advice(sit_down, goal: str) -> None:
    done, script = sit_down(goal, "", "", "", "")
    assert script.visited == NAMES[:4]
    assert (done.answers.then, done.answers.training) == ("advise", goal)
    view = replace(script.seen[-1][1], answers=done.answers)
    assert f"✗ {goal} cannot be run yet" in SCREENS[0].remarks(view)[0]
    assert view.outlook is not None
    lines = training.needs(view.outlook, goal)
    assert len(lines) == (3 if goal == "pretrain" else 5)
    for line in lines[1:-1]:
        assert re.search(r": .*B \[.+ – .+\], fits .*; .+ \[.+ – .+\] for [\d,]+ million tokens", line), line
    back, _ = sit_down("serve", answers=done.answers)
    assert (back.answers.then, back.answers.training) == ("both", "")


def test_memory_of_training_is_judged_against_the_machine(sit_down) -> None:
    _, script = sit_down("", "", start="machine")
    outlook = script.seen[-1][1].outlook
    assert outlook is not None
    for limit, said in ((2**40, "fits 1 TiB"), (2**20, "does not fit 1 MiB")):
        machine = replace(outlook.hardware, memory_limit_bytes=limit)
        ways = training.needs(replace(outlook, hardware=machine), "finetune")[1:4]
        assert all(f", {said};" in way for way in ways), ways


def test_advice_ends_after_the_workload(sit_down) -> None:
    done, script = sit_down("advise", "", "", "", "")
    assert script.visited == NAMES[:4]
    assert done.answers.then == "advise"


def test_energy_that_nothing_measures_counts_as_modelled(sit_down, forecast: Forecast) -> None:
    done, _ = sit_down("energy 1 J/token", start="budgets")
    hardware, _ = forecast.machine("local")
    (budget,) = [b for b in done.answers.parsed.budgets if b.metric == "energy_j_per_token"]
    assert budget.source == ("measured" if hardware.energy_counters else "any")


def test_the_same_spec_from_wizard_file_and_api_gives_the_same_plans(sit_down, place: Path) -> None:
    from planner import plan

    done, _ = sit_down("", "", "h100-sxm", "", "", "", "peak_memory 70 GiB", "", "", "", "")
    path = place / "leanplan.yaml"
    path.write_text(as_yaml(done.answers), encoding="utf-8")
    assert specs.load(path) == done.answers.parsed
    from_file = plan(spec=path, predict=True)
    fields = {k: v for k, v in done.answers.spec.items() if k not in ("model", "budgets", "version", "goal")}
    from_api = plan(done.answers.spec["model"]["source"], budgets=done.answers.spec["budgets"], predict=True, **fields)
    ids = [result.plan.id for result in from_file]
    assert ids
    assert ids == [result.plan.id for result in from_api]


def test_a_log_of_requests_becomes_the_workload_and_the_spec_says_so(sit_down, place: Path) -> None:
    row = {"prompt_tokens": 40, "completion_tokens": 8}
    (place / "requests.jsonl").write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    done, script = sit_down("log requests.jsonl", start="workload")
    assert done.answers.spec["workload"] == {"prompt_tokens": 40, "output_tokens": 8, "concurrency": 1}
    assert "fitted to requests.jsonl: 3 requests" in SCREENS[3].remarks(script.seen[-1][1])[0]
    assert as_yaml(done.answers).startswith("# workload fitted to requests.jsonl: 3 requests")
    (place / "fitted.yaml").write_text(as_yaml(done.answers), encoding="utf-8")
    assert specs.load(place / "fitted.yaml") == done.answers.parsed
    changed, _ = sit_down("output 9", answers=done.answers, start="workload")
    assert "fitted" not in as_yaml(changed.answers), "the numbers are the person's own now"


def test_probe_measures_this_machine_and_what_follows_is_priced_by_it(
    sit_down, forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(store: Path, *, tell: object, **settings: object) -> machine.Profile:
        tell("measuring disk")  # type: ignore[operator]
        facts = {"noise": {"warnings": ["others were busy"]}}
        slow = replace(hardware.device, memory_bytes_per_s=1e7)
        return machine.Profile(hardware=replace(hardware, devices=(slow,)), facts=facts, taken_at="now")

    hardware, note = forecast.machine("local")
    monkeypatch.setattr(machine, "profile", measure)  # the real one takes half a minute: tests of probes run it
    monkeypatch.setitem(forecast._machines, "local", (hardware, note))
    _, script = sit_down("probe", start="machine")
    (said,) = script.notes
    assert "this machine is measured" in said
    assert "others were busy" in said
    assert script.told == ["measuring disk"]
    before, *_, after = [view.outlook for _, view, _ in script.seen if view.outlook]
    assert after.unchanged.values["tpot_s"].mid > 2 * before.unchanged.values["tpot_s"].mid


def test_prices_show_their_default_and_its_source_until_they_are_given(sit_down) -> None:
    _, script = sit_down("price $0.35/h", start="machine")
    before, after = (dict(SCREENS[2].grid(view).rows) for view in (script.seen[0][1], script.seen[-1][1]))
    assert "electricity is counted" in before["price"]
    assert re.search(r"\$0\.\d+/kWh, world average, .*20\d\d", before["electricity"])
    assert re.search(r"gCO2e/kWh, world average: .*20\d\d", before["carbon"])
    assert after["price"].startswith("$0.35/h")


def test_limits_say_how_many_plans_and_minutes_to_expect(sit_down) -> None:
    _, script = sit_down("plans 2", start="limits")
    view = script.seen[-1][1]
    candidates, wall_s = (view.outlook.run.amounts[name] for name in ("candidates", "wall_s"))
    assert 1 <= candidates.low <= candidates.high <= 2
    assert 0 < wall_s.mid <= view.outlook.spec.search.time_limit_s
    assert any("plans measured 2" in line and "wall time" in line for line in SCREENS[7].remarks(view))
    assert "plans measured 2" in " ".join(SCREENS[8].remarks(view))
    shown = {row[0]: row[2] for row in SCREENS[7].grid(view).rows}
    assert "there)" in shown["memory"]
    assert "free here)" in shown["disk"]


def test_an_engine_that_is_missing_is_told_with_the_line_that_installs_it(sit_down) -> None:
    _, script = sit_down("", start="limits")
    view = script.seen[-1][1]
    assert view.outlook
    missing = Rejection(what="llama_cpp", why="xllamacpp not installed; pip install xllamacpp", kind="engine")
    lines = SCREENS[7].remarks(replace(view, outlook=replace(view.outlook, refused=(missing,))))
    assert "left out: llama_cpp: xllamacpp not installed; pip install xllamacpp" in lines
    assert any("no network" in line and "no pickle files" in line for line in lines)


def test_calibration_is_offered_with_what_it_lets_take_part(sit_down) -> None:
    _, script = sit_down("calibration bundled", start="quality")
    before, *_, after = [view for _, view, _ in script.seen if view.outlook]
    assert "`calibration bundled` lets them take part" in SCREENS[4].remarks(before)[0]
    assert SCREENS[4].remarks(after) == []
    assert after.outlook.space.count() > before.outlook.space.count()


@pytest.mark.parametrize("line", ["\0", "a\nb", "x\x1b[2Jy", "\udcff", "x" * 2000, "\u202eabc"])
@pytest.mark.parametrize("screen", ["goal", "model", "review"])
def test_garbage_is_refused_whole(sit_down, screen: str, line: str) -> None:
    done, script = sit_down(line, start=screen)
    assert "not one line of printable text" in script.notes[0]
    assert done.answers == script.seen[0][1].answers


@pytest.mark.parametrize(
    ("screen", "line"),
    [
        ("model", "x" * 600), ("model", "~nobody-of-that-name/x"), ("machine", f"{'x' * 600}.json"),
        ("workload", f"log {'x' * 600}"), ("quality", f"text {'x' * 600}"), ("review", f"file {'x' * 600}.yaml"),
        ("review", f"file {'x' * 600}/a.yaml"),
    ],
)  # fmt: skip
def test_a_path_no_system_has_is_refused(sit_down, screen: str, line: str) -> None:
    done, script = sit_down(line, start=screen)
    assert "\n" in script.notes[0]
    assert done.answers == script.seen[0][1].answers


def test_a_model_without_weights_is_priced_with_a_warning(sit_down, place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((place / "models/tiny/config.json").read_bytes())
    _, script = sit_down(str(tmp_path), start="model")
    view = script.seen[-1][1]
    assert view.outlook and view.outlook.best
    assert "✗ no weights here" in SCREENS[1].remarks(view)[-1]
    assert "✗ no weights here" in SCREENS[8].remarks(view)[0]


def test_only_folders_of_models_are_offered(tmp_path: Path) -> None:
    for name, text in (("a", '{"model_type": "llama"}'), ("b", '{"theme": "dark"}'), ("c", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
    assert local_models(tmp_path) == ("a",)


# ---------------------------------------------------------------- what is kept


def test_answers_are_kept_and_taken_up_again(sit_down, tmp_path: Path) -> None:
    done, _ = sit_down("", "", "", "", "", "ttft 2 s")
    kept_answers.keep(tmp_path, done.answers, done.screen)
    again = kept_answers.kept(tmp_path)
    assert again == (done.answers, "budgets")
    _, script = sit_down("", start=again[1], answers=again[0])
    assert script.visited == ["budgets", "priorities"]
    kept_answers.forget(tmp_path)
    assert kept_answers.kept(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 3}', '{"schema": 2, "screen": "c", "answers": {"spec": {"model": 3}}}'])  # fmt: skip
def test_kept_answers_that_cannot_be_used_are_no_start(tmp_path: Path, text: str) -> None:
    (tmp_path / kept_answers.FILE).write_text(text, encoding="utf-8")
    assert kept_answers.kept(tmp_path) is None


def test_kept_answers_say_only_what_was_answered(sit_down, tmp_path: Path) -> None:
    done, _ = sit_down()
    data = json.loads(kept_answers.keep(tmp_path, done.answers, "goal").read_text(encoding="utf-8"))
    assert set(data) == {"schema", "screen", "answers"}
    assert data["answers"]["spec"] == done.answers.spec


def test_models_planned_before_are_remembered_newest_first(tmp_path: Path) -> None:
    assert kept_answers.recent(tmp_path) == ()
    for name in ("a", "org/b", "a", *"cdef"):
        kept_answers.remember(tmp_path, name)
    assert kept_answers.recent(tmp_path) == ("f", "e", "d", "c", "a")
    for text in ("{", "3", '[1, "x\\u001b[2J", "fine"]'):
        (tmp_path / kept_answers.RECENT).write_text(text, encoding="utf-8")
        assert kept_answers.recent(tmp_path) == (("fine",) if "fine" in text else ())


# ---------------------------------------------------------------- how it looks


def drawn(
    script: Script, width: int, height: int = 40, *, turned: int = 0, encoding: str = "utf-8", terminal: bool = False
) -> str:
    """Return the last screen as text, as a terminal of that size shows it."""
    from rich.console import Console

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(
        file=out, width=width, height=height, color_system=None, legacy_windows=False, force_terminal=terminal,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    face = drawing.Face(console=console)
    face.ascii = encoding == "ascii"
    name, view, note = script.seen[-1]
    screen = next(s for s in SCREENS if s.name == name)
    face.draw(screen, view, step=NAMES.index(name) + 1, steps=9, note=note, turned=turned)
    out.flush()
    text = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    return text.removeprefix("\x1b[H\x1b[2J")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [20, 80, 120])
def test_every_screen_fits_its_terminal(sit_down, name: str, width: int) -> None:
    _, script = sit_down(start=name)
    screen = next(s for s in SCREENS if s.name == name)
    for turned in (0, 1):
        text = drawn(script, width, turned=turned)
        assert max(map(len, text.splitlines())) <= width
        flat = " ".join(text.split())
        assert screen.title in flat
        if width > 20 and not turned:
            for words in ("fits", "size", "TTFT", "TPOT", "tokens/s", "energy/token", "cost/1M tokens", "[", "Ctrl-C"):
                assert words in flat


@pytest.mark.parametrize(("width", "height"), [(80, 24), (20, 24), (120, 24), (120, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_pages_lose_nothing_and_the_screen_never_scrolls(sit_down, name: str, width: int, height: int) -> None:
    _, script = sit_down(start=name)
    screen = next(s for s in SCREENS if s.name == name)
    pages = []
    while len(pages) < 12:
        pages.append(drawn(script, width, height, turned=len(pages), terminal=True))
        assert len(pages[-1].splitlines()) < height, "the line one types in needs a row too"
        if len(pages) > 1 and pages[-1] == pages[0]:
            break
    assert len(pages) > 2, "one page of question at least, one that explains, and round again"
    seen = "".join("".join(pages).split())
    cells = [cell for row in screen.grid(script.seen[-1][1]).rows for cell in (row if width > 20 else row[:1])]
    for word in " ".join((screen.more, *cells)).split():
        assert word in seen
    assert "TPOT" in seen
    if (width, height) == (80, 24) and name != "review":
        assert "predicted for" in pages[0], "the figures stand beside every question"


def test_a_part_of_a_screen_is_broken_over_pages_only_where_no_page_can_hold_it() -> None:
    from rich.segment import Segment

    def block(name: str, lines: int) -> list[list[Segment]]:
        return [[Segment(f"{name}{i}")] for i in range(lines)]

    pages = drawing._paged([block("a", 3), block("b", 2), [], block("c", 7)], 4)
    assert ["".join(line[0].text for line in page) for page in pages] == ["a0a1a2", "b0b1", "c0c1c2c3", "c4c5c6"]


def test_an_ascii_terminal_gets_ascii(sit_down) -> None:
    _, script = sit_down("tpot 1 us", start="budgets")
    assert "!" in drawn(script, 100, encoding="ascii")


def test_hostile_names_are_shown_not_obeyed(sit_down, place: Path) -> None:
    folders = [place / "models" / name for name in ("[bold]x<b>", "x\x1b[2J", "x\u202ey")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    _, script = sit_down(start="model")
    for folder in folders:
        (folder / "config.json").unlink()
    text = drawn(script, 120)
    assert "models/[bold]x<b>" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("mid", "low", "high", "dimension", "text"),
    [
        (0.0012, 0.00066, 0.0021, "time", "1.2 ms [0.66 – 2.1]"),
        (72 * 2**20, 53 * 2**20, 2**30, "bytes", "72 MiB [53 – 1,000]"),
        (1e-9, 2e-10, 3e-9, "money", "$0.001/1M tokens [0.0002 – 0.003]"),
        (0.0, 0.0, 0.0, "ratio", "0 %"),
    ],
)
def test_an_interval_has_one_unit(mid: float, low: float, high: float, dimension: str, text: str) -> None:
    assert drawing.interval(Value(mid=mid, low=low, high=high, source="analytic"), dimension) == text


def test_tab_offers_words_models_and_paths(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    screens = {screen.name: screen for screen in SCREENS}
    assert drawing.completions(screens["model"], local_models(Path()), "models/t") == ["models/tiny", "models/tiny/"]
    assert drawing.completions(screens["budgets"], (), "peak_") == ["peak_memory"]
    assert drawing.completions(screens["quality"], (), "ow") == ["own.txt"]


# ---------------------------------------------------------------- the machine


def test_a_machine_without_a_profile_is_glanced_at_and_says_so(tmp_path: Path) -> None:
    hardware, note = known_machine("local", tmp_path)
    assert note is not None
    assert "leanplan probe" in note
    assert hardware.device.memory_bytes_per_s > 1e8
    assert not hardware.measured
    assert not list(tmp_path.iterdir()), "a glance is not kept as a profile"


def test_an_unknown_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown machine"):
        known_machine("h100-sx", tmp_path)


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("org/name", True),
        ("org/name.v1-2", True),
        ("name", False),
        ("a/b/c", False),
        ("../x", False),
        ("org/a--b", False),
    ],
)
def test_what_is_taken_for_a_hub_id(source: str, is_id: bool) -> None:
    assert is_hub_id(source) is is_id
