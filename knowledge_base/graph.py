"""The whole knowledge base as one networkx graph, its self-check, and paths through it in words.

Nodes carry `kind`: technique, metric, resource, tag, engine. Edges are keyed by what they say:

    technique -saves-> metric      technique -spends-> metric      metric -measures-> resource
    technique -needs-> tag         technique -provides-> tag       engine -offers-> tag
    technique -before | conflicts | redundant | requires | synergy-> technique   (with rule, effect, source)
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from knowledge_base.errors import BadInput
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.rules import Rule, load_rules, order, selects
from knowledge_base.types import STAGES, Step

if TYPE_CHECKING:
    import networkx


def knowledge_graph() -> networkx.MultiDiGraph:
    """Return what is known as a graph; node names are `kind:name`, see the module for kinds and edges."""
    import networkx

    graph = networkx.MultiDiGraph()
    for metric in METRICS.values():
        graph.add_node(f"metric:{metric.name}", kind="metric", summary=metric.summary)
        graph.add_node(f"resource:{metric.resource}", kind="resource")
        graph.add_edge(f"metric:{metric.name}", f"resource:{metric.resource}", key="measures")
    known = {name: module.TECHNIQUE for name, module in techniques.all().items()}
    for name, technique in known.items():
        node = f"technique:{name}"
        graph.add_node(
            node, kind="technique", summary=technique.summary, stage=technique.stage, family=technique.family
        )
        for relation, metrics in (("saves", technique.saves), ("spends", technique.spends)):
            for metric_name in metrics:
                graph.add_edge(node, f"metric:{metric_name}", key=relation)
        for relation, tags in (("needs", technique.needs), ("provides", technique.provides)):
            for tag in sorted(tags):
                graph.add_node(f"tag:{tag}", kind="tag")
                graph.add_edge(node, f"tag:{tag}", key=relation)
    for name, module in engines.all().items():
        graph.add_node(f"engine:{name}", kind="engine", summary=module.ENGINE.summary)
        for tag in sorted(module.ENGINE.offers):
            graph.add_node(f"tag:{tag}", kind="tag")
            graph.add_edge(f"engine:{name}", f"tag:{tag}", key="offers")
    for rule in load_rules():
        said = {"rule": rule.id, "condition": rule.condition, "effect": rule.effect, "source": rule.source}
        for a in (n for n, t in known.items() if selects(rule.a, n, t)):
            for b in (n for n, t in known.items() if rule.b and n != a and selects(rule.b, n, t)):
                graph.add_edge(f"technique:{a}", f"technique:{b}", key=f"{rule.relation}:{rule.id}", **said)
    return graph


def explain(technique: str, target: str) -> str:
    """Return how a technique reaches a metric, resource, tag or engine: one arrow for each step of the shortest way.

    `target` is a node name such as `resource:memory` or `engine:llama_cpp`. Engines are reached through the tags they
    offer: `weight_int8 -needs-> packed:int8 <-offers- transformers`.

    Raises:
        BadInput: either is unknown, or nothing leads from one to the other.
    """
    import networkx

    graph = knowledge_graph()
    start = f"technique:{technique}"
    for node in (start, target):
        if node not in graph:
            raise BadInput(
                f"`{node}` is not in the knowledge base",
                hint="nodes are technique:…, metric:…, resource:…, tag:…, engine:…",
            )
    ways = graph.copy()
    for a, b, key in list(graph.edges(keys=True)):
        if key == "offers":
            ways.add_edge(b, a, key="offered by")
        elif graph.nodes[b]["kind"] == "technique":
            ways.remove_edge(a, b, key)  # rules relate techniques; they do not carry an effect on
    try:
        nodes = networkx.shortest_path(ways, start, target)
    except networkx.NetworkXNoPath as error:
        raise BadInput(
            f"`{technique}` does not reach `{target}`", hint="see what it saves, spends and needs: leanplan show"
        ) from error
    words = [technique]
    for a, b in pairwise(nodes):
        said = " and ".join(sorted(ways[a][b]))
        arrow = "<-offers-" if said == "offered by" else f"-{said}->"
        words += [arrow, b.split(":", 1)[1]]
    return " ".join(words)


def verify() -> None:
    """Check that the knowledge base agrees with itself.

    Every selector of every rule means at least one technique, every knob in a condition exists on its side, every
    metric that a technique names exists, every stage exists, every needed tag is offered by some engine, and the
    `before` rules with the stages have no circle.

    Raises:
        BadInput: names the first thing that does not fit.
    """
    known = {name: module.TECHNIQUE for name, module in techniques.all().items()}
    offered = {tag for module in engines.all().values() for tag in module.ENGINE.offers}
    for name, technique in known.items():
        where = f"knowledge_base/techniques/{name}.py"
        if technique.stage not in STAGES:
            raise BadInput(f"unknown stage `{technique.stage}`", hint=f"one of {', '.join(STAGES)}", where=where)
        for metric in (*technique.saves, *technique.spends):
            if metric not in METRICS:
                raise BadInput(f"unknown metric `{metric}`", hint=f"one of {', '.join(METRICS)}", where=where)
        if unmet := technique.needs - offered:
            raise BadInput(
                f"no engine offers {', '.join(sorted(unmet))}",
                hint="correct the tag in `needs` or an engine's `offers`",
                where=where,
            )
    for rule in load_rules():
        for side, selector in (("a", rule.a), ("b", rule.b)):
            meant = [t for n, t in known.items() if selector and selects(selector, n, t)]
            if selector and not meant:
                raise BadInput(f"`{selector}` means no technique", hint="correct the selector", where=_where(rule))
            for clause in filter(None, rule.condition.split(" and ")):
                knob = clause.split()[0]
                if knob.startswith(f"{side}.") and not any(knob[2:] in t.knobs for t in meant):
                    raise BadInput(
                        f"`{selector}` has no knob `{knob[2:]}`", hint="correct the condition", where=_where(rule)
                    )
    order([Step(name) for name in known])


def _where(rule: Rule) -> str:
    return f"knowledge_base/data/composition_rules.csv: {rule.id}"
