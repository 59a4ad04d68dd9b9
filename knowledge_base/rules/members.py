"""What can be a step of a plan: our techniques and the methods of the field, and how rules select them.

gptq                        that method, or a technique that implements it
topic:weight_quantisation   every method at or below that topic, and what implements one
family:weights              every alternative of that family
stage:compress              every step of that stage
provides:quantised          every step that provides that tag
"""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_base.field import field
from knowledge_base.field.entries import Method
from knowledge_base.registry import techniques


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A technique or method as the rules see it. `names`: its own and those of the methods it implements."""

    id: str
    executable: bool  # a technique; else a method that is only known
    stage: str | None  # None: not a step, but rules may speak of it
    family: str | None
    names: frozenset[str]
    groups: frozenset[str]  # selectors other than names
    knobs: frozenset[str]

    @property
    def selectors(self) -> frozenset[str]:
        """Every selector that means it."""
        return self.names | self.groups


def members() -> dict[str, Member]:
    """Return everything a step can name: a technique hides the method that has its name and that it implements."""
    known = field()
    found = {name: _of_method(method) for name, method in known.methods.items()}
    for name, module in techniques.all().items():
        technique = module.TECHNIQUE
        methods = [known.methods[m] for m in technique.implements]
        groups = {f"family:{technique.family}", f"stage:{technique.stage}"}
        groups |= {f"provides:{tag}" for tag in technique.provides}
        found[name] = Member(
            id=name,
            executable=True,
            stage=technique.stage,
            family=technique.family,
            names=frozenset({name, *technique.implements}),
            groups=frozenset(groups.union(*(_lent(m, technique.family) for m in methods))),
            knobs=frozenset(technique.knobs),
        )
    return found


def _of_method(method: Method) -> Member:
    return Member(
        id=method.id,
        executable=False,
        stage=method.stage,
        family=method.family,
        names=frozenset({method.id}),
        groups=frozenset(_groups(method)),
        knobs=frozenset(method.knobs),
    )


def _lent(method: Method, family: str) -> set[str]:
    """Return the selectors that a technique of that family answers to because it implements the method.

    One of another family does a part of the method: it is no alternative to what is of the method's family, and what the
    method provides at its end another step still has to do.
    """
    whole = method.family in (family, None)
    return {
        group
        for group in _groups(method)
        if not group.startswith("stage:") and (whole or not group.startswith(("family:", "provides:")))
    }


def _groups(method: Method) -> set[str]:
    """Return the selectors a method answers to, beside its name."""
    groups = {f"topic:{topic}" for topic in field().upwards(method.topic)} | {
        f"provides:{tag}" for tag in method.provides
    }
    for kind, value in (("stage", method.stage), ("family", method.family)):
        if value:
            groups.add(f"{kind}:{value}")
    return groups
