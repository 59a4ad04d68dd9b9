"""The knowledge graph: the shipped knowledge agrees with itself, and paths through it are told in words."""

import networkx
import pytest

from knowledge_base import graph, rules
from knowledge_base.errors import BadInput
from knowledge_base.registry import engines, techniques


def test_the_shipped_knowledge_agrees_with_itself():
    graph.verify()


def test_every_technique_engine_and_what_they_say_is_in_the_graph():
    known = graph.knowledge_graph()
    for name, module in techniques.all().items():
        assert known.nodes[f"technique:{name}"]["family"] == module.TECHNIQUE.family
        said = {(key, target) for _, target, key in known.out_edges(f"technique:{name}", keys=True)}
        assert {("saves", f"metric:{metric}") for metric in module.TECHNIQUE.saves} <= said
        assert {("needs", f"tag:{tag}") for tag in module.TECHNIQUE.needs} <= said
    for name, module in engines.all().items():
        for tag in module.ENGINE.offers:
            assert known.has_edge(f"engine:{name}", f"tag:{tag}", "offers")


def test_before_edges_have_no_circle():
    order = networkx.DiGraph((a, b) for a, b, _ in rules.before_edges())
    assert networkx.is_directed_acyclic_graph(order)
    assert order.has_edge("drop_layers", "prune_width")


def test_rule_edges_carry_their_source():
    known = graph.knowledge_graph()
    edge = known["technique:low_rank"]["technique:prune_wanda"]["conflicts:rank-sparsity"]
    assert edge["source"]
    assert "no zeros" in edge["effect"]


def test_explain_follows_effects_and_tags():
    assert graph.explain("prune_width", "resource:memory").startswith("prune_width -saves-> ")
    assert graph.explain("prune_width", "resource:memory").endswith(" -measures-> memory")
    assert graph.explain("low_rank", "engine:transformers") == "low_rank -needs-> factorised <-offers- transformers"


def test_explain_says_what_it_does_not_know():
    with pytest.raises(BadInput, match="not in the knowledge base"):
        graph.explain("prune_width", "resource:patience")
    with pytest.raises(BadInput, match="does not reach"):
        graph.explain("prune_wanda", "tag:factorised")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,prune_widht,before,low_rank,,why,src", "`prune_widht` means no technique"),
        ("x,family:heads,conflicts,low_rank,,why,src", "`family:heads` means no technique"),
        ("x,low_rank,conflicts,prune_wanda,b.share > 1,why,src", "`prune_wanda` has no knob `share`"),
        ("x,low_rank,conflicts,engine:transformers,,why,src", "unknown selector"),
    ],
)
def test_verify_names_what_does_not_fit(tmp_path, monkeypatch, row, message):
    path = tmp_path / "rules.csv"
    path.write_text(f"id,a,relation,b,condition,effect,source\n{row}\n", encoding="utf-8")
    monkeypatch.setattr(rules, "_FILE", path)
    tables = (rules.load_rules, rules.before_edges, rules._ranks, rules._verdict, rules._missing)
    for table in tables:
        table.cache_clear()
    try:
        with pytest.raises(BadInput, match=message):
            graph.verify()
    finally:
        monkeypatch.undo()
        for table in tables:
            table.cache_clear()
