"""A folder of one's own knowledge is laid over ours: found, checked as a whole, used everywhere, refused or left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cost_models.catalogue import electricity_price, find_machine, grid_carbon, names
from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.field import field, overlay
from knowledge_base.registry import engines, techniques
from planner.isolation.environment import clean_environment

ROOT = Path(__file__).resolve().parent.parent.parent
TAXONOMY = "id,parent,name,section,lifecycle,computation,memory,energy,money,network,uncertain,note,origin\n"
EVIDENCE = "steps,model,params_b,family,task,metric,baseline,value,setting,hardware,title,source,seed_reference,note\n"
PAPERS = "id,title,year,venue,links,seeds,about,not_yet\n"
METRICS = "metric,unit,better,resource,meaning\n"
RULES = "id,a,relation,b,condition,effect,source,fact\n"
PRICES = "region,usd_per_kwh,period,source\n"
METHOD = """\
sparkle:
  name: Sparkle
  summary: Rounds weights to what glitters. It is for tests.
  topic: glitter
  lifecycle: inference
  stage: compress
  knobs: {shine: [1, 2]}
  saves: {energy: evidence}
  sources: ["https://example.org/sparkle"]
"""
TECHNIQUE = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
GOOD = {
    "taxonomy.csv": f"{TAXONOMY}glitter,model_compression,Glitter,,inference,,,,,,,,leanplan\n",
    "methods/mine.yaml": METHOD,
    "evidence.csv": f"{EVIDENCE}sparkle(shine=2),OPT-13B,13,opt,x,shine_j,10,5,,,Sparkle,https://example.org/sparkle,no,\n",
    "evidence_metrics.csv": f"{METRICS}shine_j,J,lower,energy,joules that shine\n",
    "papers.csv": f"{PAPERS}sparkle,Sparkle: all that glitters,2026,,https://example.org/sparkle,mine,sparkle,\n",
    "composition_rules.csv": f"{RULES}sparkle-alone,sparkle,conflicts,gptq,,they blind each other,https://example.org/sparkle,\n",
    "electricity_prices.csv": f"{PRICES}my-roof,0.01,2026,my meter\n",
    "grid_carbon.csv": "region,gco2e_per_kwh,year,source\nmy-roof,20,2026,my panels\n",
    "techniques/weight_rounded.py": TECHNIQUE.replace('("rtn",)', '("sparkle",)'),
    "techniques/_helper.py": "raise RuntimeError('helpers are not loaded')\n",
    "engines/lantern.py": "ENGINE = find = accepts = export = open_artefact = None\n",
    "README.md": "# Mine\n",
}  # fmt: skip


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a folder of knowledge and names it in the environment."""
    monkeypatch.delenv(overlay.VARIABLE, raising=False)
    monkeypatch.delenv(overlay.IGNORE, raising=False)
    laid: list[str] = []

    def write(files: dict[str, str], name: str = "mine") -> Path:
        folder = tmp_path / name
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        laid.append(str(folder))
        monkeypatch.setenv(overlay.VARIABLE, ":".join(laid))
        return folder

    overlay._folders.cache_clear()
    yield write
    monkeypatch.undo()
    overlay._folders.cache_clear()
    assert "weight_rounded" not in techniques.names()  # and the registry forgets the guests


def leanplan(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planner", *argv], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def device(**cells: str) -> str:
    """Return a devices.csv with one row."""
    header = (ROOT / "knowledge_base/data/devices.csv").read_text(encoding="utf-8").splitlines()[0]
    row = {
        "name": "my-box", "device": "My box", "kind": "gpu", "family": "cuda", "memory_bytes": "8000000000",
        "memory_bytes_per_s": "5e11", "float16_flop_per_s": "1e14", "source": "https://example.org/box",
    } | cells  # fmt: skip
    return f"{header}\n{','.join(row.get(column, '') for column in header.split(','))}\n"


def test_all_of_a_folder_is_used(lay):
    ours = field()
    folder = lay({**GOOD, "devices.csv": device()})
    known = field()
    assert set(known.methods) - set(ours.methods) == {"sparkle"}
    assert known.path("glitter")[-2:] == (ours.topics["model_compression"].name, "Glitter")
    assert known.evidence_of("sparkle")[0].where == f"{folder}/evidence.csv:2"
    assert len(known.evidence) == len(ours.evidence) + 1
    assert [paper.id for paper in known.papers_of("glitter")] == ["sparkle"]
    assert known.implementing("sparkle") == ("weight_rounded",) and known.status("sparkle") == "executable"
    assert "sparkle-alone" in {rule.id for rule in rules.load_rules()}
    assert techniques.get("weight_rounded").__file__ == str(folder / "techniques" / "weight_rounded.py")
    assert "lantern" in engines.names()
    assert find_machine("my-box").devices[0].memory_bytes == 8e9 and "rtx-4090" in names()
    assert (electricity_price("my-roof")[0], grid_carbon("my-roof")[0]) == (0.01, 20)


def test_without_a_folder_all_is_ours_again(lay, monkeypatch):
    lay(GOOD)
    assert "sparkle" in field().methods and "weight_rounded" in techniques.names()
    monkeypatch.delenv(overlay.VARIABLE)
    assert "sparkle" not in field().methods and "weight_rounded" not in techniques.names()
    assert "sparkle-alone" not in {rule.id for rule in rules.load_rules()}
    assert "my-roof" not in {row["region"] for row in overlay.table("grid_carbon.csv")}


def test_a_rule_takes_the_place_of_ours_and_candidates_know_of_it(lay):
    assert overlay.environment() == {}
    row = "id,a,relation,b,condition,effect,source,replaces\nweights-once,low_rank,note,,,for us it is fine,https://example.org/x,yes\n"
    folder = lay({"composition_rules.csv": row})
    assert [r.relation for r in rules.load_rules() if r.id == "weights-once"] == ["note"]
    assert clean_environment(folder)[overlay.VARIABLE] == str(folder)


def test_an_entry_replaces_ours_only_if_it_says_so(lay):
    world = f"{PRICES}world,0.5,2026,my meter\n"
    folder = lay({"electricity_prices.csv": world})
    with pytest.raises(BadInput, match="'world' is there twice") as caught:
        electricity_price()
    assert caught.value.where == f"{folder}/electricity_prices.csv:2"
    assert "replaces: yes" in caught.value.hint and "electricity_prices.csv:2" in caught.value.hint
    said = world.replace("source\n", "source,replaces\n").replace("meter\n", "meter,yes\n")
    lay({"electricity_prices.csv": said}, "better")
    (folder / "electricity_prices.csv").unlink()
    overlay._folders.cache_clear()
    assert electricity_price()[0] == 0.5
    assert "replaces" not in overlay.table("electricity_prices.csv")[-1]


def test_nothing_is_replaced_twice_by_one_folder(lay):
    said = f"{PRICES.replace('source', 'source,replaces')}world,0.5,2026,my meter,yes\n"
    folder = lay({"electricity_prices.csv": said + said.splitlines()[1] + "\n"})
    with pytest.raises(BadInput, match="'world' is there twice") as caught:
        electricity_price()
    assert caught.value.where == f"{folder}/electricity_prices.csv:3"


def test_a_later_folder_lies_over_an_earlier(lay):
    lay(GOOD)
    lay({"methods/theirs.yaml": METHOD.replace("Sparkle", "Dazzle").replace("sparkle:\n", "sparkle:\n  replaces: yes\n")},
        "over")  # fmt: skip
    assert field().methods["sparkle"].name == "Dazzle"


def test_rules_know_the_methods_of_every_folder(lay):
    data = {name: GOOD[name] for name in ("taxonomy.csv", "evidence.csv", "evidence_metrics.csv", "methods/mine.yaml")}
    lay(data)
    assert "sparkle" in rules.composition().members
    lay({"methods/more.yaml": METHOD.replace("sparkle:", "dazzle:").replace("energy: evidence", "energy: arXiv:2210.17323")},
        "more")  # fmt: skip
    assert "dazzle" in rules.composition().members


DAMAGED = [
    ("taxonomy.csv", "origin\n", "origin,colour\n", 1, "unknown key 'colour'"),
    ("taxonomy.csv", "glitter,model", "glitter,modle", 2, "unknown topic 'modle_compression'"),
    ("methods/mine.yaml", "topic: glitter", "topic: gliter", 1, "unknown topic 'gliter'"),
    ("methods/mine.yaml", "energy: evidence", "memory: evidence", 1, "no row of evidence is about it"),
    ("methods/mine.yaml", "name: Sparkle", "name: !Sparkle x", 2, "tags are not allowed"),
    ("methods/mine.yaml", "  name: Sparkle", "  replaces: yes\n  name: Sparkle", 2, "there is no 'sparkle' to replace"),
    ("methods/mine.yaml", "sparkle:\n", "gptq:\n", 1, "'gptq' is there twice"),
    ("evidence.csv", "shine=2", "shin=2", 2, "`sparkle` has no knob 'shin'"),
    ("evidence.csv", "note\n", "note,replaces\n", 1, "unknown key 'replaces'"),
    ("evidence_metrics.csv", "lower", "less", 2, "`better` cannot be 'less'"),
    ("papers.csv", ",sparkle,\n", ",sparkles,\n", 2, "unknown method or topic 'sparkles'"),
    ("composition_rules.csv", "conflicts", "fights", 2, "fights"),
    ("composition_rules.csv", "conflicts,gptq", "conflicts,gptk", 2, "gptk"),
    ("composition_rules.csv", "sparkle,conflicts,gptq", "gptq,before,sparkle", 2, "circle"),
    ("electricity_prices.csv", ",0.01,", ",cheap,", 2, "`usd_per_kwh` must be a number"),
    ("grid_carbon.csv", "gco2e_per_kwh", "grams", 1, "unknown key 'grams'"),
    ("techniques/weight_rounded.py", '"""Round', '1 +\n"""Round', 1, "SyntaxError"),
    ("techniques/weight_rounded.py", "from knowledge_base", "from knowledge_bass", 5, "ModuleNotFoundError"),
    ("techniques/weight_rounded.py", "def rejects", "def reject", None, "does not define rejects"),
    ("techniques/weight_rounded.py", '("sparkle",)', '("sparkel",)', None, "unknown method 'sparkel'"),
    ("engines/lantern.py", "find = ", "", None, "does not define find"),
]


@pytest.mark.parametrize(("file", "old", "new", "line", "said"), DAMAGED)
def test_a_damaged_folder_is_refused_with_file_and_line(lay, file, old, new, line, said):
    assert old in GOOD[file]
    folder = lay({**GOOD, file: GOOD[file].replace(old, new, 1)})
    for ask in (field, techniques.names, rules.load_rules):
        with pytest.raises(BadInput) as caught:
            ask()
        assert caught.value.where == (f"{folder}/{file}:{line}" if line else f"{folder}/{file}")
        assert said in caught.value.message
        assert "--ignore-damaged-knowledge" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("method/mine.yaml", "'method/mine.yaml' is no file of knowledge"),
        ("methods/mine.yml", "no file of knowledge"),
        ("device.csv", "no file of knowledge"),
        ("techniques/weight_gptq.py", "there is a technique `weight_gptq` already"),
    ],
)
def test_a_file_that_would_not_be_read_is_refused(lay, file, said):
    folder = lay({**GOOD, file: ""})
    with pytest.raises(BadInput) as caught:
        field()
    assert said in caught.value.message and caught.value.where == str(folder / file)


@pytest.mark.parametrize("file", ["devices.csv", "composition_rules.csv", "papers.csv"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere")])
def test_what_is_not_a_plain_file_is_refused(lay, file, make):
    folder = lay({name: text for name, text in GOOD.items() if name not in (file, "composition_rules.csv")})
    make(folder / file)
    with pytest.raises(BadInput, match="not a plain file") as caught:
        field()
    assert caught.value.where == str(folder / file)


def test_a_technique_may_not_hide_a_method_it_does_not_implement(lay):
    other = METHOD.replace("sparkle:", "weight_rounded:").replace("energy: evidence", "energy: arXiv:2210.17323")
    folder = lay({**GOOD, "methods/more.yaml": other})
    with pytest.raises(BadInput, match="`weight_rounded` has the id of something it does not implement") as caught:
        field()
    assert caught.value.where == str(folder / "techniques" / "weight_rounded.py")


def test_a_folder_that_is_not_there_is_refused(lay, monkeypatch, tmp_path):
    monkeypatch.setenv(overlay.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="no folder"):
        field()


def test_a_damaged_folder_is_left_out_as_a_whole_if_asked(lay, monkeypatch, caplog):
    lay({"electricity_prices.csv": f"{PRICES}my-town,0.2,2026,my bill\n"}, "good")
    folder = lay({**GOOD, "engines/lantern.py": "1 / 0\n"})
    monkeypatch.setenv(overlay.IGNORE, "1")
    caplog.set_level("WARNING")  # libraries that other tests import set handlers of the root logger to ERROR
    assert "sparkle" not in field().methods
    assert "weight_rounded" not in techniques.names() and "lantern" not in engines.names()
    assert "sparkle-alone" not in {rule.id for rule in rules.load_rules()}
    assert {row["region"] for row in overlay.table("electricity_prices.csv")} >= {"my-town", "world"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/engines/lantern.py:1: engine `lantern` cannot be loaded: ZeroDivisionError: division by zero; "
        "its folder is left out"
    ]


def test_code_that_would_end_leanplan_is_a_damaged_file(lay):
    folder = lay({**GOOD, "engines/lantern.py": "raise SystemExit(3)\n"})
    with pytest.raises(BadInput, match="cannot be loaded: SystemExit: 3") as caught:
        field()
    assert caught.value.where == f"{folder}/engines/lantern.py:1"


def test_an_installed_package_lays_its_folder_over_ours(lay, monkeypatch, tmp_path):
    lay(GOOD, "site/acme_leanplan")
    monkeypatch.delenv(overlay.VARIABLE)
    (tmp_path / "site" / "acme_leanplan" / "__init__.py").write_text("", encoding="utf-8")
    info = tmp_path / "site" / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{overlay.GROUP}]\nacme = acme_leanplan\n", encoding="utf-8")
    overlay._folders.cache_clear()
    assert "sparkle" not in field().methods
    monkeypatch.syspath_prepend(tmp_path / "site")
    overlay._folders.cache_clear()
    assert "sparkle" in field().methods
    assert "weight_rounded" in techniques.names()
    (info / "entry_points.txt").write_text(f"[{overlay.GROUP}]\nacme = acme_leanplna\n", encoding="utf-8")
    overlay._folders.cache_clear()
    with pytest.raises(BadInput, match="'acme_leanplna' is no package"):
        field()


def test_another_process_knows_what_this_one_does(lay, monkeypatch, tmp_path):
    assert overlay.environment() == {}
    folder = lay(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(overlay.VARIABLE, "mine")
    assert overlay.environment() == {overlay.VARIABLE: str(folder)}


def test_nothing_is_looked_for(lay, monkeypatch):
    folder = lay(GOOD)
    monkeypatch.delenv(overlay.VARIABLE)
    monkeypatch.chdir(folder)
    assert "sparkle" not in field().methods and "weight_rounded" not in techniques.names()


def test_the_command_line_takes_a_folder_and_leaves_a_damaged_one_out_only_if_asked(lay, tmp_path):
    folder = lay(GOOD)
    asked = ("show", "weight_rounded")
    assert leanplan(*asked, cwd=tmp_path).returncode == 2
    done = leanplan(*asked, "--knowledge", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder / "papers.csv").write_text("id\nx\n", encoding="utf-8")
    refused = leanplan(*asked, "--knowledge", str(folder), cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"{folder}/papers.csv:1: error: `title` is missing")
    assert "--ignore-damaged-knowledge" in refused.stderr
    ignored = leanplan("ls", "techniques", "--knowledge", str(folder), "--ignore-damaged-knowledge", cwd=tmp_path)
    assert ignored.returncode == 0 and "weight_rounded" not in ignored.stdout
    assert ignored.stderr.count("is left out") == 1
