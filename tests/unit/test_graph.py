"""The knowledge graph: the shipped knowledge agrees with itself, is told in words, exported whole, and drawn legibly."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree

import jsonschema
import networkx
import pytest

from knowledge_base import graph, pictures, rules
from knowledge_base.errors import BadInput
from knowledge_base.field import field
from knowledge_base.field.entries import RESOURCES
from knowledge_base.registry import engines, techniques
from planner import schemas
from planner.cli import main

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def known():
    return graph.knowledge_graph()


def test_the_shipped_knowledge_agrees_with_itself():
    graph.verify()


def test_every_technique_engine_and_what_they_say_is_in_the_graph(known):
    for name, module in techniques.all().items():
        assert known.nodes[f"technique:{name}"]["family"] == module.TECHNIQUE.family
        said = {(key, target) for _, target, key in known.out_edges(f"technique:{name}", keys=True)}
        assert {("saves", f"metric:{metric}") for metric in module.TECHNIQUE.saves} <= said
        assert {("needs", f"tag:{tag}") for tag in module.TECHNIQUE.needs} <= said
        assert {("implements", f"method:{method}") for method in module.TECHNIQUE.implements} <= said
    for name, module in engines.all().items():
        for tag in module.ENGINE.offers:
            assert known.has_edge(f"engine:{name}", f"tag:{tag}", "offers")


def test_the_whole_field_is_in_the_graph(known):
    entries = field()
    for kind, ids in (("method", entries.methods), ("topic", entries.topics), ("paper", entries.papers)):
        assert {f"{kind}:{id}" for id in ids} == {n for n, facts in known.nodes(data=True) if facts["kind"] == kind}
    for method in entries.methods.values():
        node = f"method:{method.id}"
        assert known.has_edge(node, f"topic:{method.topic}", "under")
        for resource, why in method.saves.items():
            assert known[node][f"resource:{resource}"]["saves"]["why"] == why
        for feature in method.requires.hardware:
            assert known.has_edge(node, f"hardware:{feature}", "needs")
    for paper in entries.papers.values():
        joined = {target.partition(":")[2] for target in known.successors(f"paper:{paper.id}")}
        assert joined == set(paper.about)
    assert {facts["kind"] for _, facts in known.nodes(data=True)} == set(graph.KINDS)


def test_every_rule_is_one_edge_that_carries_its_source(known):
    edges = {
        key.partition(":")[2]: (a, b, facts) for a, b, key, facts in known.edges(keys=True, data=True) if ":" in key
    }
    assert edges.keys() == {rule.id for rule in rules.load_rules()}
    start, end, facts = edges["rank-sparsity"]
    assert (start, end) == ("technique:low_rank", "topic:unstructured_pruning")
    assert "no zeros" in facts["effect"]
    assert all(facts["source"] for _, _, facts in edges.values())
    assert edges["fp8-hardware"][0] == edges["fp8-hardware"][1] == "method:fp8"


def test_explain_follows_effects_and_tags():
    assert graph.explain("prune_width", "resource:memory").startswith("prune_width -saves-> ")
    assert graph.explain("prune_width", "resource:memory").endswith(" -measures-> memory")
    assert graph.explain("low_rank", "engine:transformers") == "low_rank -needs-> factorised <-offers- transformers"


def test_explain_reaches_through_what_the_field_says():
    assert graph.explain("awq", "resource:memory") == "awq -saves-> memory"
    assert graph.explain("weight_gptq", "topic:quantisation") == (
        "weight_gptq -implements-> gptq -under-> weight_quantisation -under-> quantisation"
    )


def test_explain_says_what_it_does_not_know():
    with pytest.raises(BadInput, match="'resource:patience' is not in the knowledge base"):
        graph.explain("prune_width", "resource:patience")
    with pytest.raises(BadInput, match="does not reach"):
        graph.explain("prune_wanda", "tag:factorised")


def test_a_neighbourhood_in_words():
    told = graph.about("gptq")
    assert told.startswith("method:gptq  GPTQ\n")
    assert "\n  under: topic:weight_quantisation\n" in told
    assert "\n  executed by: technique:weight_gptq" in told
    assert "`gptq` requires calibration == yes" in told
    crowded = graph.about("resource:memory", limit=3)
    saved_by = next(line for line in crowded.splitlines() if line.startswith("  saved by: "))
    assert saved_by.count("method:") == 3
    assert re.search(r" and \d{3} more$", saved_by)
    with pytest.raises(BadInput, match=r"did you mean .*`method:gptq`"):
        graph.about("gptk")


@pytest.mark.parametrize("about", [None, "resource:energy", "stage:quantise"])
def test_exports_hold_everything(known, about):
    shown = graph.neighbourhood(about) if about else known
    data = json.loads(json.dumps(graph.as_json(shown), allow_nan=False))
    for back in (
        networkx.node_link_graph(data, edges="edges"),
        networkx.read_graphml(io.BytesIO(graph.as_graphml(shown).encode())),
    ):
        assert dict(back.nodes(data="kind")) == dict(shown.nodes(data="kind"))
        assert back.number_of_edges() == shown.number_of_edges() > 0


# ---------------------------------------------------------------- pictures

DRAWN = (*(f"resource:{name}" for name in RESOURCES), *(f"technique:{name}" for name in techniques.names()),
         "gptq", "lora", "moe", "topic:quantisation", "stage:serve", "engine:vllm", "tag:quantised")  # fmt: skip


def boxes_of(svg):
    root = ElementTree.fromstring(svg)
    return root, [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")]


@pytest.mark.parametrize("node", DRAWN)
def test_a_picture_can_be_read(node):
    root, boxes = boxes_of(pictures.picture(node))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == 900
    assert 2 <= len(boxes) <= pictures.MOST + 1
    for i, (x, y, w, h) in enumerate(boxes):
        assert min(x, y) >= 0 and x + w <= width and y + h <= height - 15  # the legend is below
        for x2, y2, w2, h2 in boxes[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    for group in root.iter(f"{SVG}g"):
        assert group.find(f"{SVG}title").text
    assert all("color" not in (e.get("style") or "") for e in root.iter())
    assert {e.get("stroke") for e in root.iter() if e.get("stroke")} == {"currentColor"}


def test_a_picture_of_a_resource_shows_what_saves_it_by_topic_and_its_price():
    text = list(ElementTree.fromstring(pictures.picture("resource:memory")).itertext())
    assert any(t.startswith("Weight quantisation") for t in text)
    assert "● GPTQ" in text
    assert any(t.startswith("quality: ") for t in text)
    assert "what it costs" in text


def test_hostile_words_are_drawn_and_not_obeyed():
    evil = '</text><script>alert(1)</script>\x1b[31m\u202e & "quoted" <b>' * 3
    box = pictures.Box(text=evil, tip=evil)
    svg = pictures.draw(
        pictures.Picture(title=evil, tip=evil, left=[pictures.Group(title=evil, boxes=[box])], legend=evil)
    )
    root, _ = boxes_of(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert "\x1b" not in svg and "\u202e" not in svg
    wide = pictures.draw(
        pictures.Picture(
            title="x", tip="x", left=[pictures.Group(title="x", boxes=[pictures.Box(text="語" * 99, tip="x")])]
        )
    )
    shown = max((t.text or "" for t in ElementTree.fromstring(wide).iter(f"{SVG}text")), key=len)
    assert len(shown) < 30 and shown.endswith("…")


# ---------------------------------------------------------------- the command


def test_the_command_tells_draws_and_exports(capsys, tmp_path):
    assert main(["graph"]) == 0
    assert " nodes\n" in capsys.readouterr().out
    assert main(["graph", "--about", "gptq"]) == 0
    assert capsys.readouterr().out.startswith("method:gptq  GPTQ\n")
    assert (
        main(["graph", "--about", "resource:memory", "--format", "svg", "--output-file", str(tmp_path / "m.svg")]) == 0
    )
    assert ElementTree.parse(tmp_path / "m.svg").getroot().tag == f"{SVG}svg"
    for flags in (["--json"], ["--format", "json"]):
        assert main(["graph", "--about", "gptq", *flags]) == 0
        data = json.loads(capsys.readouterr().out)
        jsonschema.validate(data, schemas.schema("graph"))
        assert {"id": "stage:quantise", "kind": "stage", "label": "quantise"} in data["nodes"]
    assert main(["graph", "--format", "graphml"]) == 0
    assert capsys.readouterr().out.startswith("<graphml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "svg"], "name a node: --about resource:memory"),
        (["--about", "resource:memoy"], "did you mean `resource:memory`"),
        (["--about", "\x1b[2J"], "'\\x1b[2J' is not in the knowledge base"),
    ],
)
def test_the_command_refuses_with_one_message(capsys, argv, message):
    assert main(["graph", *argv]) == 2
    assert message in capsys.readouterr().err
