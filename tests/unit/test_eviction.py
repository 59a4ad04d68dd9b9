"""Caches that let go of tokens and prompts read in part: what stays, what is given up, and what is scored is what decodes."""

from __future__ import annotations

import numpy
import pytest
import torch
from tiny_sessions import facts_of, load, session_of, tiny_folder
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cost_models.demand import apply_steps, demand_of
from knowledge_base.engines import _torch_eviction as eviction
from knowledge_base.engines import _torch_pruning as pruning
from knowledge_base.engines import _torch_sparse as sparse
from knowledge_base.engines import transformers
from knowledge_base.errors import CandidateFailed
from knowledge_base.registry import techniques
from knowledge_base.types import Step, Workload

TOKENS = numpy.random.default_rng(0).integers(1, 500, size=128).tolist()
PROMPT, NEW = 80, 20
EVICTING = [(method, keep) for method in eviction.METHODS for keep in (0.5, 0.2)]
RUNTIMES = [
    *({"kv_evict": method, "kv_keep": 0.5} for method in eviction.METHODS), {"prompt_keep": 0.5}, {"prompt_times": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny Llama's artefact."""
    made = tmp_path_factory.mktemp("artefact")
    transformers.export(session_of(tiny_folder()), made)
    return made


@pytest.fixture
def opened(folder):
    """Open the artefact with a runtime; closed at the end."""
    runnings = []

    def opener(runtime):
        runnings.append(transformers.open_artefact(folder, runtime))
        return runnings[-1]

    yield opener
    for running in runnings:
        running.close()


# ---------------------------------------------------------------- what stays


def attention_by_hand(query, keys, scaling):
    """The whole matrix of attention, (batch, heads, new, cells)."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = query @ keys.transpose(-1, -2) * scaling
    new, cells = scores.shape[-2:]
    later = torch.ones(new, cells, dtype=torch.bool).triu(cells - new + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("new", "cells"), [(150, 150), (1, 40), (16, 90)])
def test_attention_drawn_is_that_of_the_whole_matrix(new, cells):
    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, new, 8), torch.randn(2, 2, cells, 8)
    by_hand = attention_by_hand(query, keys, 0.3).sum(2).unflatten(1, (2, 2)).sum(2)
    assert torch.allclose(eviction.attention_drawn(query, keys, 0.3), by_hand, atol=1e-4)


def looking_at(cells, *places):
    """Keys that every query looks at in those places only, and the query: (1, 1, cells, 2) and (1, 1, cells, 2)."""
    keys = torch.zeros(1, 1, cells, 2)
    keys[0, 0, :, 1] = 1.0
    for place in places:
        keys[0, 0, place] = torch.tensor([30.0, 0.0])
    return torch.tensor([1.0, 0.0]).expand(1, 1, cells, 2), keys


def test_the_first_and_the_last_stay():
    found = eviction.recent(torch.zeros(2, 3, 40, 4), 16)
    assert found.shape == (2, 3, 16)
    assert found[1, 2].tolist() == [0, 1, 2, 3, *range(28, 40)]
    assert eviction.recent(torch.zeros(1, 1, 9, 4), 16)[0, 0].tolist() == list(range(9))


def test_what_drew_most_and_the_last_stay():
    drawn = torch.zeros(1, 2, 40)
    drawn[0, 0, [5, 11]] = torch.tensor([3.0, 9.0])
    drawn[0, 1, 20] = 1.0
    found = eviction.heavy(drawn, 4)
    assert found[0, 0].tolist() == [5, 11, 38, 39]
    assert 20 in found[0, 1].tolist()
    assert found[0, 1].tolist()[-2:] == [38, 39]
    assert eviction.heavy(drawn[..., :3], 16)[0, 0].tolist() == [0, 1, 2]


def test_what_the_last_look_at_stays_with_its_neighbours():
    query, keys = looking_at(100, 50)
    found = eviction.observed(query, keys, 1.0, 16)[0, 0].tolist()
    assert set(range(47, 54)) <= set(found)
    assert found[-8:] == list(range(92, 100))
    assert found == sorted(found)


def test_what_drew_attention_before_still_counts():
    """Sixteen tokens that look at all alike: beside the last cells those stay that drew most before."""
    watch = eviction.Watch(load(tiny_folder()), method="heavy_hitters", keep=0.5)
    layer = watch.empty_cache().layers[0]
    numbers = torch.arange(40.0).reshape(1, 1, 40, 1)
    layer.update(torch.zeros(1, 1, 24, 2), numbers[:, :, :24])
    layer.budget, layer.drawn = 16, torch.zeros(1, 1, 24)
    layer.drawn[..., [11, 17, 20, 22]] = 100.0
    for step in range(24, 40):
        keys, _ = layer.update(torch.zeros(1, 1, 1, 2), numbers[:, :, step : step + 1])
        watch.attended(0, torch.ones(1, 1, 1, 2), keys, 1.0)
    kept = layer.stored[1][0].flatten().tolist()
    assert len(kept) == 16
    assert {11, 17, 20, 22, *range(32, 40)} <= set(kept)
    assert layer.drawn.shape == (1, 1, 16)
    assert layer.drawn.max() > 100


def test_tokens_of_a_prompt_stay_for_all_heads_together():
    query, keys = looking_at(100, 50, 61)
    found = eviction.seen_tokens(query, keys, 1.0, 0.2)[0].tolist()
    assert {0, 1, 2, 3, 50, 61} <= set(found)
    assert found[-10:] == list(range(90, 100))
    assert len(found) == 20


def test_tokens_that_could_be_guessed_are_left_out():
    surprises = torch.ones(1, 90)
    surprises[0, [30, 33, 41]] = 5.0
    found = pruning.informative(surprises, 3)[0].tolist()
    assert len(found) == 30
    assert {0, 1, 2, 3, 30, 33, 41} <= set(found)
    assert found[-15:] == list(range(75, 90))


def test_surprise_is_that_of_a_model_of_the_first_layers():
    model = load(tiny_folder())
    tokens = torch.tensor([TOKENS[:90]])
    with torch.inference_mode():
        found = pruning.surprise(model, tokens)
        whole = model(tokens, use_cache=False).logits  # its layers are all there again
        assert torch.allclose(whole, load(tiny_folder())(tokens, use_cache=False).logits)
        model.model.layers = model.model.layers[:1]
        logits = model(tokens, use_cache=False).logits[0].log_softmax(-1)
    by_hand = -logits[torch.arange(89), tokens[0, 1:]]
    assert found[0, 0] == 0
    assert torch.allclose(found[0, 1:], by_hand, atol=1e-4)


# ---------------------------------------------------------------- really gone, and what remains is right


@pytest.mark.slow
@pytest.mark.parametrize(("method", "keep"), EVICTING)
def test_the_cache_has_the_bytes_that_are_predicted(opened, method, keep):
    model = facts_of(load(tiny_folder()))
    running, plain = opened({"kv_evict": method, "kv_keep": keep}), opened({})
    tokens = running.generate([TOKENS[:PROMPT]], NEW + 1).tokens
    assert [len(row) for row in tokens] == [NEW + 1]
    plain.generate([TOKENS[:PROMPT]], NEW + 1)
    token_bytes = 4 * model.kv_values_per_token
    assert plain.memory()["kv_cache_bytes"] == token_bytes * (PROMPT + NEW)
    kept = max(16, round(keep * PROMPT))
    waiting = NEW % eviction.BLOCK
    cells = {
        "window": kept + waiting,
        "snap": kept + NEW,
        "heavy_hitters": kept + waiting * (1 + model.heads / (2 * model.kv_heads)),
    }[method]
    drawn = 4 * model.layers * model.kv_heads * kept if method == "heavy_hitters" else 0  # what each cell drew so far
    assert running.memory()["kv_cache_bytes"] == token_bytes * cells + drawn

    name = {"window": "kv_cache_window", "snap": "kv_cache_snap", "heavy_hitters": "kv_cache_heavy_hitters"}[method]
    asked = Workload(prompt_tokens=PROMPT, output_tokens=NEW)
    demand = apply_steps(demand_of(model, asked, "transformers"), [Step(name, {"keep": keep})])
    predicted = demand.kv_bytes_per_token * (PROMPT + NEW)
    most = 1 + eviction.BLOCK * (1 + model.heads / (2 * model.kv_heads)) / cells
    assert running.memory()["kv_cache_bytes"] <= predicted * 1.05 <= most * 1.05 * running.memory()["kv_cache_bytes"]


@pytest.mark.parametrize(("keep", "method"), [(0.2, "window"), (0.2, "snap"), (0.2, "heavy_hitters")])
def test_an_evicted_cache_can_be_quantised(opened, keep, method):
    plain, small = ({"kv_evict": method, "kv_keep": keep}, {"kv_evict": method, "kv_keep": keep, "kv_bits": 8})
    sizes = []
    for runtime in (plain, small):
        running = opened(runtime)
        running.generate([TOKENS[:PROMPT]], 17)
        sizes.append(running.memory()["kv_cache_bytes"])
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_where_nothing_is_given_up_nothing_changes(architecture, runtime):
    """A share of nearly all keeps what plain transformers computes; so does the same artefact with nothing left out."""
    model, tokens = load(tiny_folder(architecture)), torch.tensor([TOKENS[:60]])
    with torch.inference_mode():
        wanted = model(tokens, use_cache=False).logits
        try:
            made = pruning.Pruning(model, {key: 0.999 if key.endswith("keep") else v for key, v in runtime.items()})
        except CandidateFailed as failed:
            assert (architecture, list(runtime)) == ("gpt2", ["prompt_keep"])
            assert "positions" in failed.message
            return
        cache = made.empty_cache()
        with made.reading():  # 31 tokens are too few to be shortened
            read = model(made.shortened(tokens[:, :31]), past_key_values=cache, use_cache=True)
        rest = model(tokens[:, 31:46], past_key_values=read.past_key_values).logits
        assert torch.allclose(read.logits, wanted[:, :31], atol=1e-4)
        assert torch.allclose(rest, wanted[:, 31:46], atol=1e-4)


@pytest.mark.parametrize("method", eviction.METHODS)
def test_what_remains_is_where_it_was(method):
    """A token over an evicted cache gives what plain transformers gives with all that was let go of masked out."""
    plain, model, tokens = load(tiny_folder(layers=1)), load(tiny_folder(layers=1)), torch.tensor([TOKENS[:81]])
    with torch.inference_mode():
        whole = plain(tokens[:, :80], use_cache=True).past_key_values
        watch = eviction.Watch(model, method=method, keep=0.5, prompt_keep=None, bits=None)
        part = watch.empty_cache()
        with watch.reading():
            model(tokens[:, :80], past_key_values=part)
        keys, kept = whole.layers[0].keys, part.layers[0].stored[0][0]
        assert kept.shape[-2] == 40
        assert part.get_seq_length() == 80
        seen = torch.zeros(1, keys.shape[1], 1, 81, dtype=torch.bool)
        for head in range(keys.shape[1]):  # each kept key is one of the whole's, bit for bit, in its order
            places = [int((keys[0, head] == key).all(-1).nonzero()[0, 0]) for key in kept[0, head]]
            assert places == sorted(set(places))
            seen[0, head, 0, [*places, 80]] = True
        mask = seen.repeat_interleave(plain.config.num_attention_heads // keys.shape[1], dim=1)
        wanted = plain(tokens[:, 80:], past_key_values=whole, attention_mask=mask).logits
        assert torch.allclose(model(tokens[:, 80:], past_key_values=part).logits, wanted, atol=1e-4)


def test_tokens_that_stay_in_a_pruned_prompt_are_where_they_were():
    """The layer after the choice gives what it gives by hand for the tokens that stay, at the positions they have."""
    plain, model = load(tiny_folder(layers=2)), load(tiny_folder(layers=2))
    tokens = torch.tensor([TOKENS[:80], TOKENS[20:100]])
    with torch.inference_mode():
        made = pruning.Pruning(model, {"prompt_keep": 0.5})
        cache = made.empty_cache()
        with made.reading():
            found = model(tokens, past_key_values=cache).logits
        assert found.shape[1] == 40
        hidden = plain.model.embed_tokens(tokens)
        at = torch.arange(80)[None]
        hidden = plain.model.layers[0](hidden, position_embeddings=plain.model.rotary_emb(hidden, at))
        for row in range(2):
            keys = cache.layers[0].stored[0][0][row : row + 1]
            weights = plain.model.layers[0].self_attn
            entering = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(tokens[row : row + 1]))
            query = weights.q_proj(entering).unflatten(-1, (-1, weights.head_dim)).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, *plain.model.rotary_emb(hidden, at))
            kept = eviction.seen_tokens(query, keys, weights.scaling, 0.5)
            states = hidden[row : row + 1, kept[0]]
            states = plain.model.layers[1](states, position_embeddings=plain.model.rotary_emb(states, kept))
            assert torch.allclose(plain.lm_head(plain.model.norm(states))[0], found[row], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_what_is_scored_is_what_decodes(opened, runtime):
    """The tokens that greedy decoding chose are the likeliest where the same text is scored after the same prompt."""
    running = opened(runtime)
    tokens = running.generate([TOKENS[:PROMPT]], 40).tokens[0]
    rows = running.log_probs_after(TOKENS[:PROMPT], tokens[:-1])
    assert rows.shape == (40, 512)
    assert numpy.allclose(numpy.exp(rows).sum(1), 1, atol=1e-4)
    short = rows.max(1) - rows[numpy.arange(40), tokens]
    assert short.max() < 1e-3
    whole = running.log_probs_after(TOKENS[:PROMPT], tokens[:-1], whole=True)
    plain = opened({}).log_probs([*TOKENS[:PROMPT], *tokens[:-1]])[PROMPT - 1 :]
    assert numpy.abs(whole - plain).max() < 1e-3
    assert numpy.abs(whole - rows).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_each_half_is_scored_after_the_one_before_it(opened, runtime):
    running, plain = opened(runtime), opened({}).log_probs(TOKENS)
    found = running.log_probs(TOKENS)
    assert found.shape == plain.shape
    after = running.log_probs_after(TOKENS[:64], TOKENS[64:])
    assert numpy.abs(found[63:] - after).max() < 1e-4
    after = running.log_probs_after(TOKENS[:32], TOKENS[32:63])
    assert numpy.abs(found[31:63] - after).max() < 1e-4
    assert numpy.abs(found[:31] - plain[:31]).max() < 1e-3
    assert numpy.abs(found[64:] - plain[64:]).max() > 1e-2
    assert running.log_probs(TOKENS[:1]).shape == (1, 512)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_prompts_of_a_batch_keep_what_is_theirs(opened, runtime):
    running = opened({**runtime, "batch": 2})
    prompts = [TOKENS[:70], TOKENS[40:110]]
    together = running.generate(prompts, NEW).tokens
    assert together == [running.generate([prompt], NEW).tokens[0] for prompt in prompts]


def test_later_layers_hold_fewer_of_a_prompts_tokens(opened):
    running = opened({"prompt_keep": 0.5})
    running.generate([TOKENS[:PROMPT]], 11)
    model = facts_of(load(tiny_folder()))
    assert running.memory()["kv_cache_bytes"] == 4 * model.kv_values_per_token * (PROMPT / 4 + PROMPT * 3 / 8 + 10)
    asked = Workload(prompt_tokens=PROMPT, output_tokens=10)
    demand = apply_steps(demand_of(model, asked, "transformers"), [Step("prefill_token_pruning", {"keep": 0.5})])
    assert demand.kv_bytes_per_token * (PROMPT + 10) == pytest.approx(running.memory()["kv_cache_bytes"])


def test_a_shorter_prompt_leaves_a_shorter_cache(opened):
    running = opened({"prompt_times": 2})
    running.generate([TOKENS[:PROMPT]], 11)
    token_bytes = 4 * facts_of(load(tiny_folder())).kv_values_per_token
    assert running.memory()["kv_cache_bytes"] == token_bytes * (PROMPT / 2 + 10)


# ---------------------------------------------------------------- blocks that are not looked at


@pytest.mark.parametrize("tokens", [512, 700])
def test_all_blocks_give_exact_attention(tokens):
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 8)
    by_hand = attention_by_hand(query, keys, 0.3) @ values.repeat_interleave(2, dim=1)
    assert torch.allclose(sparse.block_sparse(query, keys, values, 0.3, 1.0), by_hand, atol=1e-4)


def test_a_block_looks_at_what_matches_and_at_no_more():
    """Each block's values say which it is: what comes out of the last one is of those it may look at."""
    spans = 12
    tokens = spans * sparse.SPAN
    keys, values = torch.zeros(1, 1, tokens, spans), torch.zeros(1, 1, tokens, spans)
    for span in range(spans):
        values[..., span * sparse.SPAN : (span + 1) * sparse.SPAN, span] = 1.0
    keys[..., 5 * sparse.SPAN : 6 * sparse.SPAN, 0] = 1.0  # matches the query: the third best of three
    query = torch.zeros(1, 2, tokens, spans)
    query[..., 0] = 1.0
    out = sparse.block_sparse(query, keys, values, 0.1, 0.25)
    assert sparse.chosen_blocks(spans - 1, 0.25) == 3
    seen = (out[0, :, -1] > 1e-6).tolist()
    assert seen == [[span in (0, 5, spans - 2, spans - 1) for span in range(spans)]] * 2
    assert (out[0, 0, 70] > 1e-6).nonzero()[:, 0].tolist() == [0, 1]


def test_blocks_are_left_out_of_long_prompts_only(tmp_path):
    transformers.export(session_of(tiny_folder(context_tokens=1024)), tmp_path)
    running, plain = transformers.open_artefact(tmp_path, {"block_keep": 0.1}), transformers.open_artefact(tmp_path, {})
    text = numpy.random.default_rng(1).integers(1, 500, size=700).tolist()
    assert running.prunes
    for length, differs in ((500, False), (640, True)):
        rows = running.log_probs_after(text[:length], text[length : length + 20])
        whole = running.log_probs_after(text[:length], text[length : length + 20], whole=True)
        wanted = plain.log_probs(text[: length + 20])[length - 1 :]
        assert numpy.abs(whole - wanted).max() < 1e-3
        assert (numpy.abs(rows - wanted).max() > 1e-2) == differs
    made, exact = running.generate([text[:640]], 8), plain.generate([text[:640]], 8)
    assert running.memory() == plain.memory()
    assert len(made.tokens[0]) == len(exact.tokens[0]) == 8
    running.close()
    plain.close()


@pytest.mark.parametrize(("tokens", "keep"), [(512, 0.25), (4096, 0.25), (4096, 0.1)])
def test_pairs_are_predicted_as_they_are_computed(tokens, keep):
    spans = tokens // sparse.SPAN
    pairs = sum(
        sparse.chosen_blocks(i, keep) * sparse.SPAN**2 + sparse.SPAN * (sparse.SPAN + 1) / 2 for i in range(spans)
    )
    predicted = techniques.get("prefill_block_sparse").looked_at(tokens, keep)
    assert predicted == pytest.approx(pairs / (tokens * (tokens + 1) / 2), rel=0.01)
    model = facts_of(load(tiny_folder()))
    demand = demand_of(model, Workload(prompt_tokens=tokens, output_tokens=8), "transformers")
    after = apply_steps(demand, [Step("prefill_block_sparse", {"keep": keep})])
    assert after.prompt_pairs_ratio == pytest.approx(predicted * demand.prompt_pairs_ratio)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("runtime", RUNTIMES[:-1], ids=str)  # a shorter prompt asks nothing of the cache
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "mamba"])
def test_layers_without_every_tokens_keys_are_refused(architecture, runtime, tmp_path):
    transformers.export(session_of(tiny_folder(architecture)), tmp_path)
    with pytest.raises(CandidateFailed, match="keys and values") as caught:
        transformers.open_artefact(tmp_path, runtime)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
@pytest.mark.parametrize(
    "other", [{"compile": True}, {"ffn_keep": 0.5}, {"lookup_tokens": 4}, {"prompt_keep": 0.5, "prompt_times": 2}], ids=str
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(folder, runtime, other):
    with pytest.raises(CandidateFailed) as caught:
        transformers.open_artefact(folder, {**runtime, **other})
    assert caught.value.kind == "unsupported"
    assert caught.value.hint


def test_half_a_setting_is_refused(folder):
    for runtime in (
        {"kv_evict": "window"},
        {"kv_keep": 0.5},
        {"kv_evict": "oldest", "kv_keep": 0.5},
        {"prompt_times": 1},
    ):
        with pytest.raises(CandidateFailed):
            transformers.open_artefact(folder, runtime)


@pytest.mark.parametrize(
    "name", ["kv_cache_window", "kv_cache_heavy_hitters", "kv_cache_snap", "prefill_token_pruning"]
)
def test_prompts_that_would_be_kept_whole_are_no_choice(name):
    model, technique = facts_of(load(tiny_folder())), techniques.get(name)
    short, long = (Workload(prompt_tokens=n, output_tokens=8) for n in (16, 400))
    assert "kept whole" in technique.legal({"keep": 0.5}, model, short, None)
    assert technique.legal({"keep": 0.5}, model, long, None) is None
