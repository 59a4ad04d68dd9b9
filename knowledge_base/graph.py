"""All that is known as one networkx graph: its self-check, paths and neighbourhoods in words, and its exports.

Nodes are named `kind:name` and carry `kind` and `label`. Edges are keyed by what they say:

    technique -implements-> method     technique -saves | spends-> metric     technique -needs | provides-> tag
    method -under-> topic -under-> topic        method -saves | spends-> resource        topic -saves-> resource
    method -runs on-> engine    method -needs-> hardware    method -provides-> tag    engine -offers-> tag
    technique | method -at-> stage -before-> stage    technique | method -one of-> family
    paper -about-> method | topic    metric -measures-> resource    survey_metric -measures-> resource, -told as-> metric
    … -before | conflicts | redundant | requires | synergy | weakens | note-> …   one for each composition rule

A rule joins the nodes its selectors name (a topic, a family, a stage, a tag, one technique), not everything they mean,
and itself where it speaks of one side alone.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.field import field
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.types import STAGES
from knowledge_base.units import quote

if TYPE_CHECKING:
    import networkx

KINDS = (
    "technique", "method", "topic", "resource", "metric", "survey_metric", "stage", "family", "engine", "hardware", "tag",
    "paper",
)  # fmt: skip
_SELECTED = {"topic": "topic", "family": "family", "stage": "stage", "provides": "tag"}  # kind of selector -> of node
_BACKWARDS = {  # how an edge is told from its other end
    "implements": "executed by", "saves": "saved by", "spends": "spent by", "needs": "needed by", "provides": "provided by",
    "under": "holds", "runs on": "runs", "offers": "offered by", "at": "holds", "one of": "holds", "about": "papers",
    "measures": "measured by", "told as": "told of", "before": "after",
}  # fmt: skip


def knowledge_graph() -> networkx.MultiDiGraph:
    """Return what is known as a graph; see the module for kinds and edges. The caller may change it."""
    import networkx

    graph = networkx.MultiDiGraph()
    for node, facts in _nodes():
        kind, _, name = node.partition(":")
        graph.add_node(node, **{"kind": kind, "label": name, **facts})
    for start, end, key, facts in _edges():
        for node in (start, end):
            if node not in graph:  # a tag, an engine or a feature that is only spoken of
                kind, _, name = node.partition(":")
                graph.add_node(node, kind=kind, label=name)
        graph.add_edge(start, end, key=key, **facts)
    return graph


def _nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    known = field()
    for name, module in techniques.all().items():
        technique = module.TECHNIQUE
        yield (
            f"technique:{name}",
            {
                "summary": technique.summary,
                "stage": technique.stage,
                "family": technique.family,
                "status": "executable",
            },
        )
    for method in known.methods.values():
        yield (
            f"method:{method.id}",
            {
                "label": method.name, "summary": method.summary, "lifecycle": method.lifecycle,
                "status": known.status(method.id), "evidence": len(known.evidence_of(method.id)),
            },
        )  # fmt: skip
    for topic in known.topics.values():
        yield f"topic:{topic.id}", {"label": topic.name, "section": topic.section, "origin": topic.origin}
    for metric in METRICS.values():
        yield f"metric:{metric.name}", {"label": metric.label, "summary": metric.summary, "better": metric.better}
    for survey in known.survey_metrics.values():
        yield f"survey_metric:{survey.id}", {"label": survey.name, "section": survey.section, "better": survey.better}
    for stage in STAGES:
        yield f"stage:{stage}", {}
    for name, module in engines.all().items():
        yield f"engine:{name}", {"summary": module.ENGINE.summary}
    for paper in known.papers.values():
        yield (
            f"paper:{paper.id}",
            {"label": paper.title, "year": paper.year or "", "venue": paper.venue, "links": " | ".join(paper.links)},
        )


def _edges() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Yield (start, end, what the edge says, its attributes)."""
    yield from _technique_edges()
    yield from _field_edges()
    for earlier, later in pairwise(STAGES):
        yield f"stage:{earlier}", f"stage:{later}", "before", {}
    for metric in METRICS.values():
        yield f"metric:{metric.name}", f"resource:{metric.resource}", "measures", {}
    for name, module in engines.all().items():
        for tag in sorted(module.ENGINE.offers):
            yield f"engine:{name}", f"tag:{tag}", "offers", {}
    engine = rules.composition()
    for rule in engine.rules:
        start, end = ends(rule, engine)
        said = {"rule": rule.id, "condition": rule.condition, "effect": rule.effect, "source": rule.source}
        yield start, end or start, f"{rule.relation}:{rule.id}", said


def _technique_edges() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    for name, module in techniques.all().items():
        node, technique = f"technique:{name}", module.TECHNIQUE
        yield node, f"stage:{technique.stage}", "at", {}
        yield node, f"family:{technique.family}", "one of", {}
        for method in technique.implements:
            yield node, f"method:{method}", "implements", {}
        for relation, metrics in (("saves", technique.saves), ("spends", technique.spends)):
            for metric in metrics:
                yield node, f"metric:{metric}", relation, {}
        for relation, tags in (("needs", technique.needs), ("provides", technique.provides)):
            for tag in sorted(tags):
                yield node, f"tag:{tag}", relation, {}


def _field_edges() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    known = field()
    for topic in known.topics.values():
        if topic.parent:
            yield f"topic:{topic.id}", f"topic:{topic.parent}", "under", {}
        for resource, strength in topic.effects.items():
            yield f"topic:{topic.id}", f"resource:{resource}", "saves", {"strength": strength, "why": "table 2"}
    for method in known.methods.values():
        node = f"method:{method.id}"
        yield node, f"topic:{method.topic}", "under", {}
        for relation, effects in (("saves", method.saves), ("spends", method.spends)):
            for resource, why in effects.items():
                yield node, f"resource:{resource}", relation, {"why": why}
        for key, value in (
            ("at", method.stage and f"stage:{method.stage}"),
            ("one of", method.family and f"family:{method.family}"),
        ):
            if value:
                yield node, value, key, {}
        for tag in sorted(method.provides):
            yield node, f"tag:{tag}", "provides", {}
        for engine in method.requires.engine:
            yield node, f"engine:{engine}", "runs on", {}
        for feature in method.requires.hardware:
            yield node, f"hardware:{feature}", "needs", {}
    for paper in known.papers.values():
        for about in paper.about:
            yield f"paper:{paper.id}", f"{'topic' if about in known.topics else 'method'}:{about}", "about", {}
    for metric in known.survey_metrics.values():
        yield f"survey_metric:{metric.id}", f"resource:{metric.resource}", "measures", {}
        for name in metric.leanplan:
            yield f"survey_metric:{metric.id}", f"metric:{name}", "told as", {}


def ends(rule: rules.Rule, engine: rules.Composition) -> tuple[str, str]:
    """Return the nodes a rule joins; the second is empty where it speaks of one side alone."""
    return _selected(rule.a, engine), _selected(rule.b, engine)


def _selected(selector: str, engine: rules.Composition) -> str:
    kind, _, value = selector.rpartition(":")
    if kind:
        return f"{_SELECTED[kind]}:{value}"
    if not selector:
        return ""
    return f"{'technique' if engine.members[selector].executable else 'method'}:{selector}"


# ---------------------------------------------------------------- in words


def find(text: str, graph: networkx.MultiDiGraph) -> str:
    """Return the node that a person means: `resource:memory`, or `gptq` where the kind goes without saying.

    Raises:
        BadInput: there is no such node; with the nearest.
    """
    for node in (text, *(f"{kind}:{text}" for kind in KINDS)):
        if node in graph:
            return node
    kind = text.partition(":")[0]
    names = {node.partition(":")[2]: node for node in sorted(graph, key=_place, reverse=True)}
    if kind in KINDS:
        near = difflib.get_close_matches(text, [node for node in graph if node.startswith(f"{kind}:")], n=3)
    else:
        near = [names[name] for name in difflib.get_close_matches(text, names, n=3)]
    guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
    raise BadInput(f"{quote(text)} is not in the knowledge base{guess}", hint=f"nodes are {':…, '.join(KINDS)}:…")


def _place(node: str) -> int:
    return KINDS.index(node.partition(":")[0])


def explain(start: str, target: str) -> str:
    """Return how a technique reaches a metric, resource, tag or engine: one arrow for each step of the shortest way.

    `target` is a node name such as `resource:memory` or `engine:llama_cpp`. Engines are reached through the tags they
    offer: `weight_int8 -needs-> packed:int8 <-offers- transformers`.

    Raises:
        BadInput: either is unknown, or nothing leads from one to the other.
    """
    import networkx

    graph = knowledge_graph()
    first, last = find(start, graph), find(target, graph)
    ways = networkx.DiGraph()
    for a, b, key in graph.edges(keys=True):
        if ":" in key or graph.nodes[a]["kind"] == "stage":
            continue  # rules and stages relate techniques; they do not carry an effect on
        if key == "offers":
            ways.add_edge(b, a, said="<-offers-", length=1)
        else:  # what our code says of itself comes before what is said of the method it executes
            ways.add_edge(a, b, said=f"-{key}->", length=2 if key == "implements" else 1)
    try:
        nodes = networkx.shortest_path(ways, first, last, weight="length")
    except (networkx.NetworkXNoPath, networkx.NodeNotFound) as error:
        raise BadInput(
            f"`{start}` does not reach `{target}`",
            hint=f"see what it saves, spends and needs: leanplan graph --about {start}",
        ) from error
    words = [first.partition(":")[2]]
    for a, b in pairwise(nodes):
        words += [ways[a][b]["said"], b.partition(":")[2]]
    return " ".join(words)


def about(text: str, limit: int = 8) -> str:
    """Return the neighbourhood of a node in words: what it is, what it is joined to, and the rules that name it.

    At most `limit` neighbours are named for each relation; the others are counted.

    Raises:
        BadInput: there is no such node.
    """
    graph = knowledge_graph()
    node = find(text, graph)
    facts = graph.nodes[node]
    lines = [f"{node}  {facts['label']}" if facts["label"] != node.partition(":")[2] else node]
    lines += [f"  {key}: {facts[key]}" for key in facts if key not in ("kind", "label") and facts[key] != ""]
    for said, others in neighbours(graph, node).items():
        more = f" and {len(others) - limit} more" if len(others) > limit else ""
        lines.append(f"  {said}: {', '.join(others[:limit])}{more}")
    told = [f"  {rule.sentence} [{rule.id}; {rule.source}]" for rule in rules_of(node)]
    return "\n".join([*lines, *([f"rules that name it: {len(told)}", *told] if told else [])])


def summary() -> str:
    """Return how many nodes of each kind and edges of each sort there are."""
    graph = knowledge_graph()
    kinds = Counter(kind for _, kind in graph.nodes(data="kind"))
    sorts = Counter(f"rule: {key.partition(':')[0]}" if ":" in key else key for _, _, key in graph.edges(keys=True))
    lines = [f"{len(graph):,} nodes"]
    lines += [f"  {count:5,} {kind}" for kind, count in kinds.most_common()]
    lines += [f"{graph.number_of_edges():,} edges"]
    lines += [f"  {count:5,} {sort}" for sort, count in sorts.most_common()]
    return "\n".join([*lines, "leanplan graph --about NODE tells one of them, --format svg draws it"])


def neighbours(graph: networkx.MultiDiGraph, node: str) -> dict[str, list[str]]:
    """Return the nodes joined to one by edges that are not rules: what the edge says from here -> nodes, sorted."""
    found: dict[str, set[str]] = {}
    for a, b, key in (*graph.out_edges(node, keys=True), *graph.in_edges(node, keys=True)):
        if ":" not in key:
            said, other = (key, b) if a == node else (_BACKWARDS[key], a)
            found.setdefault(said, set()).add(other)
    return {said: sorted(others) for said, others in found.items()}


def rules_of(node: str) -> tuple[rules.Rule, ...]:
    """Return the rules about a node: those that mean a technique or method, or that name anything else."""
    kind, _, name = node.partition(":")
    if kind in ("technique", "method"):
        return rules.about(name)
    engine = rules.composition()
    return tuple(rule for rule in engine.rules if node in ends(rule, engine))


# ---------------------------------------------------------------- exports


def neighbourhood(text: str) -> networkx.MultiDiGraph:
    """Return a node, everything it is joined to, and the edges between these.

    Raises:
        BadInput: there is no such node.
    """
    graph = knowledge_graph()
    node = find(text, graph)
    return graph.subgraph({node, *graph.successors(node), *graph.predecessors(node)}).copy()


def as_json(graph: networkx.MultiDiGraph) -> dict[str, Any]:
    """Return a graph in networkx's node-link form, plain JSON types throughout."""
    import networkx

    return networkx.node_link_data(graph, edges="edges")


def as_graphml(graph: networkx.MultiDiGraph) -> str:
    """Return a graph as GraphML."""
    import networkx

    return "\n".join(networkx.generate_graphml(graph))


# ---------------------------------------------------------------- self-check


def verify() -> None:
    """Check that the knowledge base agrees with itself.

    Every metric, stage and method that a technique names exists, every tag it needs is offered by some engine, every
    selector of every rule means something, every knob in a condition exists on its side, and the `before` rules with
    the stages have no circle. What the files of the field must obey: knowledge_base/field/checking.py.

    Raises:
        BadInput: names the first thing that does not fit.
    """
    offered = {tag for module in engines.all().values() for tag in module.ENGINE.offers}
    for name, module in techniques.all().items():
        technique, where = module.TECHNIQUE, f"knowledge_base/techniques/{name}.py"
        for noun, words, known in (
            ("stage", (technique.stage,), STAGES),
            ("metric", (*technique.saves, *technique.spends), METRICS),
            ("method", technique.implements, field().methods),
        ):
            for word in words:
                if word not in known:
                    raise BadInput(f"unknown {noun} `{word}`", hint=f"one of {', '.join(known)}", where=where)
        if unmet := technique.needs - offered:
            raise BadInput(
                f"no engine offers {', '.join(sorted(unmet))}",
                hint="correct the tag in `needs` or an engine's `offers`", where=where,
            )  # fmt: skip
    rules.composition()
