"""Composition rules: the facts are readable and sourced, and what they forbid, need and order is what they say."""

import itertools
import random

import pytest

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.registry import techniques
from knowledge_base.rules import conditions, members, reading
from knowledge_base.types import STAGES, Device, Hardware, Step

HEADER = "id,a,relation,b,condition,effect,source,fact\n"
SOURCE = "https://arxiv.org/abs/2401.00625"


@pytest.fixture
def composed(tmp_path):
    """Return the engine over the shipped steps and rules of one's own, read from a file."""

    def compose(text: str, *more: str, header: str = HEADER) -> rules.Composition:
        files = []
        for i, rows in enumerate((text, *more)):
            path = tmp_path / f"rules{i or ''}.csv"
            path.write_text(header + rows + "\n", encoding="utf-8")
            files.append((path, path.name))
        return rules.Composition(members.members(), reading.read(files))

    return compose


def every_step():
    for name, module in techniques.all().items():
        knobs = module.TECHNIQUE.knobs
        for values in itertools.product(*(choice.options for choice in knobs.values())):
            yield Step(name, dict(zip(knobs, values, strict=True)))


def test_every_rule_has_a_source_and_a_unique_id():
    shipped = rules.load_rules()
    assert len(shipped) > 140
    assert len({rule.id for rule in shipped}) == len(shipped)
    for rule in shipped:
        assert "://" in rule.source or ".py" in rule.source, rule.id


def test_two_of_one_family_and_twice_the_same_are_refused():
    by_family = {}
    for step in every_step():
        by_family.setdefault(techniques.get(step.technique).TECHNIQUE.family, []).append(step)
    for steps in by_family.values():
        for a, b in itertools.combinations(steps, 2):
            assert rules.conflict((a, b)), (a, b)


def test_a_technique_and_the_method_it_executes_are_one_thing():
    broken = rules.violations([Step("weight_gptq", {"group_size": 32}), Step("gptq", {"bits": 4})])
    assert "a plan does each thing once [once; " in {f.rule.id: f.sentence for f in broken}["once"]


@pytest.mark.parametrize(
    ("a", "b", "rule"),
    [
        (Step("torch_compile"), Step("kv_cache_quantised", {"bits": 8}), "compile-kv"),
        (Step("torch_compile"), Step("prompt_lookup", {"tokens": 4}), "compile-lookup"),
        (Step("low_rank", {"keep": 0.8}), Step("prune_wanda", {"sparsity": 0.5}), "rank-sparsity"),
        (Step("prompt_lookup", {"tokens": 4}), Step("batch_size", {"count": 4}), "lookup-batch"),
        (Step("prompt_lookup", {"tokens": 4}), Step("batch_size", {"count": 1}), None),
        (Step("prune_wanda", {"sparsity": 0.5}), Step("prune_width", {"keep": 0.75}), None),
        (Step("qlora", {"rank": 8}), Step("lora", {"rank": 8}), "qlora-lora"),
        (Step("gptq", {"bits": 4}), Step("awq", {"bits": 4}), "weights-once"),
    ],
)
def test_pairs(a, b, rule):
    for pair in ((a, b), (b, a)):  # a conflict does not depend on the order of writing
        sentence = rules.conflict(pair)
        if rule is None:
            assert sentence is None
        else:
            assert sentence.startswith("`")
            assert f"[{rule}; " in sentence


def test_a_conflict_stays_whatever_is_added():
    steps = list(every_step())
    pick = random.Random(0)
    for _ in range(300):
        some = pick.sample(steps, 3)
        if rules.conflict(some[:2]):
            assert rules.conflict(some)


def test_recovery_needs_damage():
    recover = Step("recover_lora", {"steps": 20})
    assert "requires a step of stage `compress`" in rules.missing((recover,))
    assert rules.missing((recover, Step("weight_dtype", {"dtype": "bfloat16"})))
    for name in ("prune_wanda", "prune_width", "drop_layers", "low_rank", "sparsegpt"):
        assert rules.missing((recover, Step(name))) is None


def test_order_is_by_stage_then_rules_whatever_the_writing_order():
    names = ["recover_lora", "batch_size", "prune_wanda", "weight_dtype", "prune_width", "drop_layers"]
    expected = ["weight_dtype", "drop_layers", "prune_width", "prune_wanda", "recover_lora", "batch_size"]
    for shuffled in itertools.permutations(names):
        assert [step.technique for step in rules.order([Step(n) for n in shuffled])] == expected


def test_order_keeps_every_before_rule_and_stage():
    engine = rules.composition()
    place = {step.technique: i for i, step in enumerate(rules.order([Step(name) for name in engine.members]))}
    for earlier, later in itertools.permutations(place, 2):
        assert place[earlier] < place[later] or not engine.comes_before(earlier, later)
    staged = [stage for name in sorted(place, key=place.get) if (stage := engine.members[name].stage)]
    assert [STAGES.index(stage) for stage in staged] == sorted(STAGES.index(stage) for stage in staged)


def test_a_pipeline_of_methods_has_its_order_and_what_is_free_has_several():
    steps = [Step("gptq", {"bits": 4}), Step("smoothquant"), Step("lora"), Step("llm_pruner")]
    assert [step.technique for step in rules.order(steps)] == ["llm_pruner", "lora", "smoothquant", "gptq"]
    assert len(list(rules.orders(steps))) == 1
    free = [Step("prefix_caching"), Step("chunked_prefill"), Step("gptq")]
    assert [[s.technique for s in order] for order in rules.orders(free)] == [
        ["gptq", "chunked_prefill", "prefix_caching"], ["gptq", "prefix_caching", "chunked_prefill"]
    ]  # fmt: skip


def test_unknown_technique_is_named_with_its_neighbours():
    for ask in (rules.order, rules.conflict, rules.missing, rules.violations, rules.advice, rules.additions):
        with pytest.raises(BadInput, match="Did you mean `prune_wanda`"):
            ask([Step("prune_wnada")])


def test_advice_tells_what_a_pair_gains_and_what_one_does_not():
    steps = [
        Step("kv_cache_quantised", {"bits": 8}), Step("batch_size", {"count": 4}), Step("prune_wanda", {"sparsity": 0.5}),
    ]  # fmt: skip
    told = {finding.rule.id: finding.sentence for finding in rules.advice(steps)}
    assert told["kv-batch"].startswith("`kv_cache_quantised` and `batch_size` gain together where count > 1: ")
    assert told["wanda-dense"].startswith("`prune_wanda` gains less: ")
    alone = [steps[0], Step("batch_size", {"count": 1})]
    assert "kv-batch" not in {finding.rule.id for finding in rules.advice(alone)}


def test_a_fact_of_the_machine_is_enforced_where_known_and_told_where_not():
    fp8 = [Step("fp8")]
    ada, ampere = ({"hardware.compute_capability": number} for number in (8.9, 8.0))
    assert rules.missing(fp8, ada) is None
    assert "`fp8` requires hardware.compute_capability >= 8.9: " in rules.missing(fp8, ampere)
    assert rules.missing(fp8) is None
    told = {finding.rule.id: finding.sentence for finding in rules.advice(fp8)}
    assert ">= 8.9, which is not known here: " in told["fp8-hardware"]
    assert "fp8-hardware" not in {finding.rule.id for finding in rules.advice(fp8, ada)}


def test_a_gain_that_may_shrink_is_told_as_if():
    told = {finding.rule.id: finding.sentence for finding in rules.advice([Step("gguf", {"type": "q4_k"})])}
    assert told["gguf-llama3"].startswith("if model.family == llama-3: `gguf` gains less: ")
    assert "gguf-q3-k" not in told


def test_a_shrinking_gain_forbids_nothing():
    steps = [Step("kv_cache_quant", {"bits": 4}), Step("gptq", {"bits": 4}), Step("batch_size", {"count": 32})]
    context = {"engine": "transformers", "model.heads": 32, "model.kv_heads": 8, "workload.concurrency": 32}
    assert rules.violations(steps, context) == ()
    told = {finding.rule.id for finding in rules.advice(steps, context)}
    assert {"kv-weights", "kv-gqa", "bits4-batch", "bits4-load", "gptq-memory"} <= told


def test_a_knob_is_compared_with_a_fact():
    cluster = [Step("device_cluster", {"devices": 8})]
    assert "cannot be used where devices > model.kv_heads" in rules.conflict(cluster, {"model.kv_heads": 4})
    assert rules.conflict(cluster, {"model.kv_heads": 8}) is None


def test_additions_say_why_not_and_what_else():
    found = {addition.name: addition for addition in rules.additions([Step("gptq", {"bits": 4})])}
    assert "gptq" not in found
    assert {finding.rule.id for finding in found["awq"].forbidden} >= {"weights-once"}
    assert [finding.rule.id for finding in found["recover_lora"].needs] == ["recover-needs-damage"]
    assert not found["smoothquant"].forbidden


@pytest.mark.parametrize(
    ("text", "a", "b", "context", "holds"),
    [
        ("", {}, {}, {}, True),
        ("b.count > 1", {}, {"count": 2}, {}, True),
        ("b.count > 1", {}, {"count": 1}, {}, False),
        ("b.count > 1", {}, {}, {}, None),
        ("a.bits <= 4 and b.type == q4_k", {"bits": 4}, {"type": "q4_k"}, {}, True),
        ("a.bits <= 4 and b.type == q4_k", {"bits": 8}, {"type": "q4_k"}, {}, False),
        ("a.bits <= 4 and b.type == q4_k", {"bits": 8}, {}, {}, False),
        ("a.bits <= 4", {"bits": "mixed"}, {}, {}, None),
        ("a.type != q4_k", {"type": "q8_0"}, {}, {}, True),
        ("a.pattern == 2:4", {"pattern": "2:4"}, {}, {}, True),
        ("engine == vllm", {}, {}, {"engine": "vllm"}, True),
        ("engine == vllm", {}, {}, {}, None),
        ("model.kv_heads < model.heads", {}, {}, {"model.kv_heads": 8, "model.heads": 32}, True),
        ("model.kv_heads < model.heads", {}, {}, {"model.kv_heads": 8}, None),
        ("hardware.features has nvidia", {}, {}, {"hardware.features": frozenset({"nvidia"})}, True),
        ("a.bits <= 4 and engine == vllm", {"bits": 8}, {}, {}, False),
    ],
)
def test_conditions(text, a, b, context, holds):
    assert conditions.parse(text).holds(a, b, context) is holds


@pytest.mark.parametrize(
    "text",
    ["count > 1", "b.count", "b.type < q4_k", "__import__('os')", "b.count > 1 or a.x > 2", "model.kv_hedas > 1",
     "c.bits > 1", "engine = vllm", "a.bits <= 4 and ", "hardware.name.__class__ == x"],
)  # fmt: skip
def test_unreadable_conditions_are_refused(text):
    with pytest.raises(BadInput):
        conditions.parse(text)


def test_facts_are_taken_and_never_guessed():
    device = Device(
        name="x",
        kind="gpu",
        memory_bytes=1,
        memory_bytes_per_s=1.0,
        flop_per_s={},
        features=frozenset({"nvidia", "sm_89"}),
    )
    machine = Hardware(name="x", devices=(device, device), host_memory_bytes=1, memory_limit_bytes=1)
    assert rules.facts(hardware=machine, engine="vllm", calibration=False) == {
        "engine": "vllm", "calibration": "no", "hardware.kind": "gpu", "hardware.devices": 2,
        "hardware.compute_capability": 8.9, "hardware.features": frozenset({"nvidia", "sm_89"}),
    }  # fmt: skip
    assert rules.facts() == {}


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (f"x,low_rank,excludes,prune_wanda,,why,{SOURCE},", 2, "`relation` cannot be 'excludes'"),
        ("x,low_rank,conflicts,prune_wanda,,why,,", 2, "`source` is empty"),
        ("x,low_rank,conflicts,prune_wanda,,why,somebody,", 2, "is not a source"),
        (f"x,low_rank,conflicts,,,why,{SOURCE},", 2, "needs a second selector or a condition"),
        (f"x,low_rank,before,prune_wanda,a.keep > 0.5,why,{SOURCE},", 2, "takes no condition"),
        (f"x,low_rank,note,,,why,{SOURCE},\nx,low_rank,note,,,why,{SOURCE},", 3, "'x' is there twice"),
        (f"x,low_rank,note,,,why,{SOURCE},103", 2, "there is no fact 103"),
        (f"x,low_rank,note,,,why,{SOURCE},0", 2, "there is no fact 0"),
        (f"x,low_rank,note,,,why,{SOURCE},1.5", 2, "there is no fact 1.5"),
        (f"x,low_rank,conflicts,prune_wanda,a.keep > > 1,why,{SOURCE},", 2, "cannot read the condition"),
        (f"x,low_rank,conflicts,prune_wanda,weather == rain,why,{SOURCE},", 2, "unknown fact `weather`"),
        (f"x,low_rank,requires,prune_wanda,b.sparsity > 0,why,{SOURCE},", 2, "asks for a knob of b"),
        (f"x,low_rank,note,,,why,{SOURCE}", 2, "7 cells in a table of 8 columns"),
        (f"x,prune_widht,before,low_rank,,why,{SOURCE},", 2, "'prune_widht' means no technique"),
        (f"x,family:hedas,conflicts,low_rank,,why,{SOURCE},", 2, "'family:hedas' means no technique"),
        (f"x,topic:pruninng,conflicts,low_rank,,why,{SOURCE},", 2, "Did you mean `topic:pruning`"),
        (f"x,low_rank,conflicts,prune_wanda,b.share > 1,why,{SOURCE},", 2, "'prune_wanda' has no knob `share`"),
        (f"x,low_rank,conflicts,engine:transformers,,why,{SOURCE},", 2, "unknown selector"),
    ],
)
def test_damaged_rule_files_are_refused(composed, row, line, message):
    with pytest.raises(BadInput, match=f"(?s)^rules.csv:{line}: .*{message}") as raised:
        composed(row)
    assert raised.value.hint


def test_a_file_with_other_columns_is_refused(composed):
    with pytest.raises(BadInput, match=r"rules.csv:1: .*`source` is missing"):
        composed("x,low_rank,note,,,why", header="id,a,relation,b,condition,effect\n")


def test_a_circle_is_found_across_files_and_shown(composed):
    with pytest.raises(BadInput, match="circle: low_rank -> prune_width -> low_rank") as raised:
        composed(f"x,prune_width,before,low_rank,,why,{SOURCE},", f"y,low_rank,before,prune_width,,why,{SOURCE},")
    assert "x (rules.csv:2)" in str(raised.value)
    assert "y (rules1.csv:2)" in str(raised.value)


def test_a_rule_against_the_stages_is_a_circle(composed):
    with pytest.raises(BadInput, match="circle: prune_width -> recover_lora -> prune_width") as raised:
        composed(f"x,recover_lora,before,prune_width,,why,{SOURCE},")
    assert raised.value.where == "rules.csv:2"


def test_a_need_may_depend_on_a_knob(composed):
    engine = composed(f"x,gptq,requires,low_rank,a.bits <= 2,why,{SOURCE},")
    assert engine.missing([Step("gptq", {"bits": 2})]).startswith("`gptq` requires `low_rank` where bits <= 2: why")
    assert engine.missing([Step("gptq", {"bits": 2}), Step("low_rank")]) is None
    assert engine.missing([Step("gptq", {"bits": 4})]) is None
    assert engine.missing([Step("gptq")]) is None
    assert engine.advice([Step("gptq")])[0].sentence.startswith("if bits <= 2: `gptq` requires")


def test_rules_of_a_persons_own_folder_count(tmp_path, monkeypatch):
    (tmp_path / "composition_rules.csv").write_text(
        f"{HEADER}mine,gptq,conflicts,flash_attention,,not at our place,{SOURCE},\n", encoding="utf-8"
    )
    monkeypatch.setenv("LEANPLAN_KNOWLEDGE", str(tmp_path))
    assert "not at our place" in rules.conflict([Step("gptq"), Step("flash_attention")])


def test_a_damaged_rule_of_ones_own_is_named_with_its_line(tmp_path, monkeypatch):
    path = tmp_path / "composition_rules.csv"
    path.write_text(f"{HEADER}mine,gtpq,note,,,not at our place,{SOURCE},\n", encoding="utf-8")
    monkeypatch.setenv("LEANPLAN_KNOWLEDGE", str(tmp_path))
    with pytest.raises(BadInput, match=r"composition_rules.csv:2: .*'gtpq' means no technique"):
        rules.load_rules()
