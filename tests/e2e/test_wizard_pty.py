"""The wizard at a real pseudo-terminal, as a person meets it: what is on the screen is read with a terminal emulator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
import yaml

from knowledge_base.serde import restore
from knowledge_base.types import Plan

ROOT = Path(__file__).resolve().parents[2]
TITLES = (
    "What is it for?", "Which model?", "Which machine will it run on?", "What will it be asked to do?",
    "How much quality may it lose?", "What must hold?", "What should it be best at?", "What may the search use?", "Is this right?",
)  # fmt: skip
PATIENCE_S = 60  # the machine may be busy
pytestmark = pytest.mark.timeout(300)


class Terminal:
    """A terminal with `leanplan` in it. `text` is what stands on its screen, `raw` all that was ever written."""

    def __init__(self, folder: Path, *argv: str, columns: int = 100, rows: int = 60, **environment: str) -> None:
        base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "LC_ALL", "LC_CTYPE", "COLUMNS", "LINES")}
        env = {**base, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), **environment}
        self.child = pexpect.spawn(
            sys.executable, ["-m", "planner", *argv], cwd=str(folder), env=env, dimensions=(rows, columns), timeout=5
        )
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, *words: str) -> str:
        """Read until all the words stand on the screen, or were written on a terminal that only scrolls; return the text."""
        stop = time.monotonic() + PATIENCE_S
        while not all(word in self._flat() for word in words):
            assert time.monotonic() < stop, f"{words} did not appear in:\n{self.text}"
            try:
                self._take(self.child.read_nonblocking(65536, 0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                self.child.close()
                how = f"exit {self.child.exitstatus}, signal {self.child.signalstatus}"
                assert all(word in self._flat() for word in words), f"it ended ({how}) without {words}:\n{self.text}"
        return self.text

    def until_changed(self, text: str) -> str:
        """Read until the screen is another than `text`, and has come to rest."""
        stop = time.monotonic() + PATIENCE_S
        quiet = False
        while not quiet or self.text == text:
            assert time.monotonic() < stop, f"nothing happened on:\n{text}"
            try:
                self._take(self.child.read_nonblocking(65536, 0.3))
                quiet = False
            except pexpect.TIMEOUT:
                quiet = True
        return self.text

    def _take(self, data: bytes) -> None:
        self.raw += data
        self.stream.feed(data)

    def _flat(self) -> str:
        return " ".join(self.text.split())

    def type(self, line: str | bytes) -> None:
        self.child.sendline(line)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.reset()
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def end(self) -> int:
        """Read to the end and return the exit code."""
        while True:
            try:
                self._take(self.child.read_nonblocking(65536, PATIENCE_S))
            except pexpect.EOF:
                break
            except pexpect.TIMEOUT:
                pytest.fail(f"it did not end:\n{self.text}")
        self.child.close()
        assert self.child.exitstatus is not None, f"killed by signal {self.child.signalstatus}"
        return self.child.exitstatus


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny model, as a user's would be."""
    from planner.tiny_models import make_tiny_model

    make_tiny_model(tmp_path / "models" / "tiny")
    return tmp_path


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Terminal]]:
    """Return what starts the wizard in `place`; whatever is still running at the end is closed."""
    started = []

    def begin(*argv: str, **settings: object) -> Terminal:
        started.append(Terminal(place, *argv, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for terminal in started:
        terminal.child.close(force=True)


def through(terminal: Terminal, *, last: str = "") -> None:
    """Accept every screen but the last, then type `last`."""
    for title in TITLES[:-1]:
        terminal.until(title, "Ctrl-C")
        terminal.type("")
    terminal.until(TITLES[-1])
    terminal.type(last)


def validate(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "validate", str(path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=path.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_enter_through_all_screens_saves_a_spec_that_is_valid(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start(columns=120)
    terminal.until(TITLES[0], "1 of 9", "predicted", "TPOT", "tokens/s", "cost/1M tokens")
    through(terminal, last="save")
    text = terminal.until("save write the file only", "model: {source: models/tiny}")
    terminal.type("")
    assert terminal.end() == 0
    text = terminal.text
    assert "wrote leanplan.yaml" in text
    assert "leanplan plan leanplan.yaml" in text
    assert "model: {source: models/tiny}" in text
    validate(place / "leanplan.yaml")
    assert not (place / ".leanplan" / "wizard.json").exists()


def test_a_budget_out_of_reach_is_told_with_the_tightest_that_is_not(start: Callable[..., Terminal]) -> None:
    terminal = start(columns=120)
    for title in TITLES[:5]:
        terminal.until(title)
        terminal.type("")
    terminal.until(TITLES[5], "reachable")
    terminal.type("tpot 1 us")
    terminal.until("✗ tpot_p50 ≤ 1 us is out of reach; tightest: `tpot_p50", "no plan is predicted to keep every limit")
    terminal.type("tpot tightest")
    terminal.until("≤", "best plan")
    assert "out of reach" not in terminal.text


def test_ctrl_c_keeps_the_answers_and_the_next_start_goes_on(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start()
    terminal.until(TITLES[0])
    terminal.type("")
    terminal.until(TITLES[1])
    terminal.type("")
    terminal.until(TITLES[2])
    terminal.type("h100-sxm")
    terminal.until("h100-sxm", "not this machine", "answers >")
    time.sleep(0.5)
    terminal.child.sendintr()
    assert terminal.end() == 130
    assert "your answers are kept in .leanplan/wizard.json" in terminal.text
    assert (place / ".leanplan" / "wizard.json").is_file()

    again = start()
    again.until("You stopped at `machine`, for models/tiny.", "n starts afresh")
    again.type("")
    again.until(TITLES[2], "h100-sxm", "answers >")
    time.sleep(0.5)
    again.child.sendeof()
    assert again.end() == 130

    afresh = start()
    afresh.until("n starts afresh")
    afresh.type("n")
    afresh.until(TITLES[0], "1 of 9")


def test_sigterm_keeps_the_answers_too(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start()
    terminal.until(TITLES[0], "answers >")
    time.sleep(0.5)
    terminal.child.kill(signal.SIGTERM)
    assert terminal.end() == 143
    assert (place / ".leanplan" / "wizard.json").is_file()


@pytest.mark.parametrize(
    ("columns", "rows"),
    [(20, 24), pytest.param(80, 24, marks=pytest.mark.slow), pytest.param(120, 40, marks=pytest.mark.slow)],
)
def test_every_screen_fits_and_its_pages_lead_round(start: Callable[..., Terminal], columns: int, rows: int) -> None:
    terminal = start(columns=columns, rows=rows)
    for title in TITLES:
        first = terminal.until(title, "keeps your answers >")
        assert first.startswith("leanplan"), "nothing has left the screen at the top"
        for _ in range(20):
            now = terminal.text
            terminal.type("?")
            terminal.until_changed(now)
            if "? more" in terminal.text or columns > 20:
                break
        assert terminal.text.startswith("leanplan")
        if title != TITLES[-1]:
            terminal.type("")


def test_a_resized_terminal_is_drawn_anew_and_keeps_what_was_typed(start: Callable[..., Terminal]) -> None:
    terminal = start(columns=80, rows=24)
    terminal.until(TITLES[0], "predicted for", "answers >")
    terminal.child.send("fine")
    terminal.until("> fine")
    terminal.resize(120, 30)
    terminal.until("╭", "best plan", "> fine")
    terminal.resize(60, 30)
    terminal.until("predicted for", "> fine")
    assert "╭" not in terminal.text
    terminal.type("tune")
    terminal.until("▸ finetune", "cannot be run yet")


def test_pasted_garbage_is_not_taken_for_answers(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start()
    terminal.until(TITLES[0], "answers >")
    for line in (b"\xff\xfe\xfd", b"\x1b[200~serve\n\n\n\x1b[201~", b"x" * 1500):
        terminal.type(line)
        terminal.until(TITLES[0], "not one line of printable text")
        now = terminal.text
        terminal.type("?")
        terminal.until_changed(now)
    assert not (place / "leanplan.yaml").exists()
    assert b"Traceback" not in terminal.raw


def test_tab_completes_what_one_may_type(start: Callable[..., Terminal]) -> None:
    terminal = start()
    terminal.until(TITLES[0], "answers >")
    terminal.child.send("fin\t")
    terminal.until("> finetune")
    terminal.child.send("\x15")  # Ctrl-U: away with it
    terminal.type("")
    terminal.until(TITLES[1], "answers >")
    terminal.child.send("models/t\t")
    terminal.until("> models/tiny")


def test_hostile_folder_names_are_shown_and_not_obeyed(start: Callable[..., Terminal], place: Path) -> None:
    for name in ("[bold red]x", "<script>y", "z\x1b[2J\x1b]0;title\x07"):
        folder = place / "models" / name
        folder.mkdir()
        (folder / "config.json").write_bytes((place / "models/tiny/config.json").read_bytes())
    terminal = start()
    terminal.until(TITLES[0], "answers >")
    terminal.type("")
    terminal.until("models/[bold red]x", "models/<script>y")
    assert b"]0;title" not in terminal.raw
    terminal.type("models/<script>y")
    terminal.until("▸ 1", "no weights here")


def test_models_planned_before_come_first(start: Callable[..., Terminal], place: Path) -> None:
    from planner.tiny_models import make_tiny_model

    make_tiny_model(place / "models" / "other")
    (place / "models" / "zoo").mkdir()
    (place / "models" / "tiny").rename(place / "models" / "zoo" / "deep")
    terminal = start()
    terminal.until(TITLES[0])
    terminal.type("advise")
    terminal.until("1 of 4")
    terminal.type("")
    terminal.until(TITLES[1])
    terminal.type("models/zoo/deep")
    terminal.until("models/zoo/deep", "parameters")
    for title in TITLES[1:4]:
        terminal.until(title, "answers >")
        terminal.type("")
    assert terminal.end() == 0
    again = start()
    again.until(TITLES[0])
    again.type("")
    again.until(TITLES[1], "▸ 1 models/zoo/deep", "2 models/other")


def test_a_log_is_fitted_and_its_bad_line_is_named(start: Callable[..., Terminal], place: Path) -> None:
    good = '{"prompt_tokens": 20, "completion_tokens": 8}\n'
    (place / "bad.jsonl").write_text(good + "oops\n", encoding="utf-8")
    (place / "good.jsonl").write_text(good * 4, encoding="utf-8")
    terminal = start(columns=80, rows=24)
    for title in TITLES[:3]:
        terminal.until(title, "answers >")
        terminal.type("")
    terminal.until(TITLES[3], "answers >")
    terminal.type("log bad.jsonl")
    terminal.until("bad.jsonl:2: not JSON", "predicted for")
    terminal.type("log good.jsonl")
    terminal.until("fitted to good.jsonl: 4 requests", "prompt 20", "output 8")


@pytest.mark.parametrize("goal", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_training_goals_end_in_advice_and_not_in_a_wall(start: Callable[..., Terminal], place: Path, goal: str) -> None:
    terminal = start(columns=100, rows=400)
    terminal.until(TITLES[0], "answers >")
    terminal.type(goal)
    terminal.until(f"✗ {goal} cannot be run yet", "1 of 4")
    for title in TITLES[:4]:
        terminal.until(title, "answers >")
        terminal.type("")
    assert terminal.end() == 0
    for words in (
        "cannot be run by this version",
        "AdamW",
        "million tokens",
        "arXiv:",
        "What binds",
        "next: leanplan",
    ):
        assert words in terminal.text
    assert not (place / "leanplan.yaml").exists()


def test_the_same_spec_from_wizard_file_and_api_gives_the_same_plan_ids(
    start: Callable[..., Terminal], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = start(columns=160, rows=300)
    for title in TITLES[:2]:
        terminal.until(title, "answers >")
        terminal.type("")
    terminal.until(TITLES[2], "answers >")
    terminal.type("l4")
    terminal.until("not this machine")
    for title in TITLES[2:5]:
        terminal.until(title, "answers >")
        terminal.type("")
    terminal.until(TITLES[5], "answers >")
    terminal.type("peak_memory 20 GiB")
    terminal.until("≤ 20 GiB")
    for title in TITLES[5:8]:
        terminal.until(title, "answers >")
        terminal.type("")
    terminal.until(TITLES[8])
    terminal.type("both")
    terminal.until("▸ both")
    terminal.type("")
    assert terminal.end() == 0, "prices are all there is to a run on another machine"
    done = subprocess.run(
        [sys.executable, "-m", "planner", "plan", "leanplan.yaml", "--json"], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    from_file = [restore(Plan, result["plan"]).id for result in json.loads(done.stdout)["results"]]
    monkeypatch.chdir(place)
    from planner import plan

    said = yaml.safe_load((place / "leanplan.yaml").read_text(encoding="utf-8"))
    model, budgets = said.pop("model")["source"], said.pop("budgets")
    fields = {name: value for name, value in said.items() if name not in ("version", "goal")}
    from_api = plan(model, budgets=budgets, **fields)
    assert from_file == [result.plan.id for result in from_api.results]
    ids = [word for word in terminal.text.split() if re.fullmatch("[0-9a-f]{10}", word)]
    assert set(ids) == set(from_file)


def test_a_file_that_is_there_is_not_overwritten_without_asking(start: Callable[..., Terminal], place: Path) -> None:
    (place / "leanplan.yaml").write_text("mine\n", encoding="utf-8")
    terminal = start()
    through(terminal, last="save")
    terminal.type("")
    terminal.until("overwrite leanplan.yaml? y/N")
    terminal.type("")
    terminal.until(TITLES[-1], "Ctrl-C")
    assert (place / "leanplan.yaml").read_text(encoding="utf-8") == "mine\n"
    terminal.type("file other.yaml")
    terminal.until("file other.yaml")
    terminal.type("")
    assert terminal.end() == 0
    assert (place / "leanplan.yaml").read_text(encoding="utf-8") == "mine\n"
    validate(place / "other.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "marks"),
    [
        (dict(columns=20, rows=100), ""),
        (dict(TERM="dumb", rows=100), ""),
        (dict(LC_ALL="C"), "ascii"),
        (dict(PYTHONIOENCODING="ascii:strict"), "ascii"),
        (dict(NO_COLOR="1"), "colourless"),
    ],
    ids=lambda value: str(value),
)
def test_poor_terminals_survive(start: Callable[..., Terminal], settings: dict, marks: str) -> None:
    terminal = start(**settings)
    terminal.until("What is it for?")
    terminal.type("finetune")
    terminal.until("cannot be run yet")
    terminal.type("?")
    terminal.until("takes a model as it is")
    terminal.type("")
    terminal.until("Which model?", "models/tiny", "answers >")
    time.sleep(0.5)  # a signal in the moment before Python begins to read a line is seen only at the next key
    terminal.child.sendintr()
    assert terminal.end() == 130
    assert b"Traceback" not in terminal.raw
    if marks == "ascii":
        assert terminal.raw.isascii()
    if marks == "colourless":
        assert b"\x1b[3" not in terminal.raw
    if settings.get("TERM") == "dumb":
        assert b"\x1b[2J" not in terminal.raw
        assert b"\x1b[3" not in terminal.raw


def test_advice_from_the_wizard(start: Callable[..., Terminal]) -> None:
    terminal = start(columns=120, rows=400)
    terminal.until(TITLES[0])
    terminal.type("advise")
    terminal.until("1 of 4")
    for title in TITLES[:4]:
        terminal.until(title)
        terminal.type("")
    assert terminal.end() == 0
    assert "What binds" in terminal.text


def test_without_a_terminal_there_is_help_and_no_question(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner"], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: leanplan" in done.stderr


def test_no_input_asks_nothing_at_a_terminal(start: Callable[..., Terminal]) -> None:
    terminal = start("--no-input")
    assert terminal.end() == 2
    assert b"usage: leanplan" in terminal.raw


def test_the_first_screen_needs_no_heavy_library(place: Path) -> None:
    script = """
import sys
from pathlib import Path
from planner.forecast import Forecast
from planner.wizard.conversation import Conversation
from planner.wizard.drawing import Face
from planner.wizard.screens import defaults
from planner.wizard.screens.model import local_models

def show(*args, **settings):
    Face().draw(*args, **settings)
    print(sorted({"numpy", "torch", "transformers", "optuna", "networkx", "scipy", "sklearn"} & set(sys.modules)))
    raise SystemExit(0)

models = local_models(Path())
Conversation(defaults(models), Forecast(Path("store")), models, ask=None, show=show).lead()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
    assert TITLES[0] in done.stderr


@pytest.mark.slow
def test_the_machine_can_be_measured_from_inside(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start(columns=120)
    for title in TITLES[:2]:
        terminal.until(title, "answers >")
        terminal.type("")
    terminal.until(TITLES[2], "glanced at", "answers >")
    terminal.type("probe")
    terminal.until("measuring memory bandwidth")
    terminal.until("this machine is measured", "best plan")
    assert "glanced at" not in terminal.text
    assert list((place / ".leanplan" / "machines").glob("*.json"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_the_first_screen_to_a_recommended_plan(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start(columns=120, rows=50)
    for title in TITLES[:4]:
        terminal.until(title)
        terminal.type("")
    terminal.until(TITLES[4])
    terminal.type("loss any")
    terminal.until("loss any")
    terminal.type("")
    for title in TITLES[5:7]:
        terminal.until(title)
        terminal.type("")
    terminal.until(TITLES[7])
    for line, shown in (("plans 2", "plans 2"), ("time 4 min", "time 4 min")):
        terminal.type(line)
        terminal.until(shown)
    terminal.type("")
    terminal.until(TITLES[8], "both write the file and run it now")
    terminal.type("")
    terminal.until("▸ unchanged model", "left; 0 of at most 2 plans measured")
    terminal.until("✓ unchanged model ▸ candidates", "● transformers: unchanged", "▸ ")
    assert terminal.end() == 0
    assert "Next:" in terminal.text
    assert "leanplan report" in terminal.text
    assert "of at most 2 plans measured" not in terminal.text, "the live picture is taken away at the end"
    validate(place / "leanplan.yaml")
    (run,) = (place / "runs").iterdir()
    assert (run / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_in_the_run_is_the_runs_own(start: Callable[..., Terminal], place: Path) -> None:
    terminal = start(columns=120, rows=50)
    through(terminal)
    terminal.until("▸ unchanged model", "plans measured")
    terminal.child.sendintr()
    assert terminal.end() == 130
    assert "the same command resumes this run" in terminal.text
    assert not (place / ".leanplan" / "wizard.json").exists()
