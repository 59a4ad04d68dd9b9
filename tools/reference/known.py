"""The pages of what is known: how techniques compose, engines, the field, the survey and the papers."""

from __future__ import annotations

from tools.reference.markdown import code, codes, docstring, facts, inline, page, table


def composition() -> str:
    from knowledge_base import rules

    rows = [
        (f'<a id="{r.id}"></a>{r.id}', code(r.a), r.relation, code(r.b), code(r.condition), inline(r.effect), inline(r.source))
        for r in rules.load_rules()
    ]  # fmt: skip
    heads = ("rule", "a", "relation", "b", "condition", "effect", "source")
    return page(
        "How techniques compose", "`knowledge_base/rules.py` and its data", docstring(rules), table(heads, rows)
    )


def engines() -> str:
    from knowledge_base.registry import engines as registry

    parts = []
    for name, module in registry.all().items():
        e = module.ENGINE
        known = {
            "what it is": inline(e.summary), "computes on": codes(sorted(e.devices)), "offers": codes(sorted(e.offers)),
            "Python modules": codes(e.modules), "sources": ", ".join(inline(s) for s in e.sources),
        }  # fmt: skip
        parts += [f"## {name}\n", docstring(module), facts(known)]
    return page("Engines", "`knowledge_base/engines/`", *parts)


def knowledge() -> str:
    from knowledge_base.field import field
    from knowledge_base.field.entries import RESOURCES
    from knowledge_base.field.matrix import matrix
    from knowledge_base.pictures import picture
    from planner.reports.knowledge.matrix import as_markdown

    known = field()
    parts = [as_markdown(matrix()) + "\n", "## What saves a resource, and at what price\n"]
    parts += [
        part
        for name in RESOURCES
        for part in (f"### {name.capitalize()}\n", f"<div>{picture(f'resource:{name}')}</div>\n")
    ]
    parts += ["## Every technique\n"]
    for topic in known.topics.values():
        methods = [m for m in known.methods.values() if m.topic == topic.id]
        if methods:
            read = f"Table 2 of the survey was read so: {inline(topic.note)}\n" if topic.effects and topic.note else ""
            lines = [
                f'- <a id="{m.id}"></a>**{inline(m.name)}** {code(m.id)}, {known.status(m.id)}. {inline(m.summary)} '
                f"{inline(', '.join(m.sources[:2]))}"
                for m in methods
            ]
            parts += [f"### {' / '.join(known.path(topic.id))}\n", read, "\n".join(lines) + "\n"]
    return page("Techniques of the field", "`knowledge_base/data/field/`", *parts)


def survey() -> str:
    from knowledge_base.field import field

    known = field()
    metrics = [
        (inline(m.name), m.section, m.unit, m.better, m.resource, inline(m.how), codes(m.leanplan) or inline(m.not_yet))
        for m in known.survey_metrics.values()
    ]
    benchmarks = [
        (inline(b.name), inline(b.what), inline(b.leanplan), inline(", ".join(b.sources)))
        for b in known.benchmarks.values()
    ]
    attention = [
        (inline(a.name), code(f"O({a.time})"), code(f"O({a.memory})"), inline(a.symbols), inline(a.source))
        for a in known.attention.values()
    ]
    challenges = [
        part
        for c in known.challenges.values()
        for part in (f"### {c.name}\n", inline(c.question) + "\n", facts({"what Leanplan does": inline(c.answer), "where": codes(c.files), "what is left": inline(c.left)}))
    ]  # fmt: skip
    return page(
        "Metrics, benchmarks and challenges of the survey", "`knowledge_base/data/field/`",
        "## Metrics (section 9.1)\n",
        table(("metric", "section", "unit", "better", "resource", "how it is measured", "in Leanplan"), metrics),
        "## Attention (Table 1)\n", table(("variant", "time", "memory", "symbols", "source"), attention),
        "## Benchmarks (section 9.2)\n", table(("benchmark", "what it does", "beside Leanplan", "sources"), benchmarks),
        "## Open challenges (section 10)\n", *challenges,
    )  # fmt: skip


def papers() -> str:
    from knowledge_base.field import field

    rows = [
        (
            str(p.year or ""),
            inline(p.title),
            inline(p.venue),
            inline(" ".join(p.links[:2])),
            codes(p.about) or inline(p.not_yet),
        )
        for p in sorted(field().papers.values(), key=lambda p: (-(p.year or 0), p.title.casefold()))
    ]
    return page(
        "Papers of the surveys", "`knowledge_base/data/field/papers.csv`",
        "Every title of the four surveys Leanplan was made from, once, with what it is about.\n",
        table(("year", "title", "venue", "links", "about"), rows),
    )  # fmt: skip
