"""What a client may send, what it may not, and what it gets to read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TEMPLATE, TINY

from knowledge_base.engines._running import Sampling
from knowledge_base.engines._sampling import Sampler
from planner.serving.asking import Refusal, Stops, read
from planner.serving.texts import Texts

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n", "logit_bias",
     "model", "ignore_eos", "role", "content", "max_completion_tokens", "response_format", "tools"]
)  # fmt: skip


def asked(chat: bool = False, **fields: Any) -> Any:
    return read(json.dumps({**({} if chat else {"prompt": "x"}), **fields}).encode(), chat=chat)


# ---------------------------------------------------------------- requests


def test_what_is_not_said_is_as_openai_has_it_but_greedy() -> None:
    one = asked()
    assert (one.text, one.tokens, one.max_tokens, one.stream, one.usage) == ("x", None, None, False, False)
    assert one.sampling == Sampling()


def test_everything_that_is_understood_arrives() -> None:
    one = asked(
        model="m", prompt=[1, 2], max_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=["a", "b"], stream=True,
        stream_options={"include_usage": True}, ignore_eos=True, user="somebody", n=1, logit_bias={}, logprobs=None,
    )  # fmt: skip
    assert (one.model, one.tokens, one.max_tokens, one.stop) == ("m", (1, 2), 3, ("a", "b"))
    assert one.sampling == Sampling(temperature=0.5, top_p=0.9, seed=7)
    assert one.stream and one.usage and one.ignore_eos
    assert asked(prompt=[[1, 2]]).tokens == (1, 2)
    assert asked(prompt=["x y"]).text == "x y"


def test_the_parts_of_a_message_become_its_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = asked(chat=True, messages=[{"role": "user", "content": parts, "name": "n"}]).messages
    assert message == {"role": "user", "content": "ab"}
    assert asked(chat=True, messages=[{"role": "user", "content": "a"}], max_completion_tokens=5).max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [-1]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": None}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [[]]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": "1"}, "max_tokens"), ({"temperature": 2.1}, "temperature"), ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"), ({"temperature": 10**400}, None), ({"top_p": 0}, "top_p"), ({"seed": 0.5}, "seed"),
        ({"seed": 2**63}, "seed"), ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"), ({"stop": [1]}, "stop"),
        ({"stream": 1}, "stream"), ({"stream_options": {"other": 1}}, "stream_options"), ({"stream_options": []}, "stream_options"),
        ({"n": 2}, "n"), ({"logprobs": 5}, "logprobs"), ({"echo": True}, "echo"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"model": ["m"]}, "model"), ({"model": "m" * 2000}, "model"), ({"what": 1}, "what"), ({"\ud800": 1}, "?"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(Refusal) as refusal:
        asked(**fields)
    assert refusal.value.status == 400
    if param:
        assert refusal.value.param == param
    json.dumps(refusal.value.body).encode()


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", [1], [{"role": "user"}], [{"role": "king", "content": "x"}], [{"content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], [{"role": "user", "content": [None]}],
        [{"role": ["user"], "content": "x"}], [{"role": "user", "content": "\udfff"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}], [{"role": "user", "content": "x"}] * 5000,
    ],
)  # fmt: skip
def test_conversations_that_are_none(messages: object) -> None:
    with pytest.raises(Refusal) as refusal:
        asked(chat=True, messages=messages)
    assert refusal.value.status == 400 and str(refusal.value.param).startswith("messages")


@settings(deadline=None)
@given(body=st.binary(max_size=200) | ANY.map(lambda value: json.dumps(value).encode()), chat=st.booleans())
def test_any_body_is_read_or_refused(body: bytes, chat: bool) -> None:
    try:
        read(body, chat=chat)
    except Refusal as refusal:
        assert refusal.status == 400
        json.dumps(refusal.body).encode()


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(FIELDS, ANY, max_size=6), chat=st.booleans())
def test_any_values_are_read_or_refused(fields: dict[str, Any], chat: bool) -> None:
    start = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    try:
        one = read(json.dumps({**start, **fields}).encode(), chat=chat)
    except Refusal as refusal:
        assert refusal.status == 400
        json.dumps(refusal.body).encode()
    else:
        assert 0 <= one.sampling.temperature <= 2 and 0 < one.sampling.top_p <= 1
        assert one.max_tokens is None or one.max_tokens >= 1


# ---------------------------------------------------------------- stop texts


@settings(deadline=None)
@given(
    text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)  # fmt: skip
def test_an_answer_ends_before_the_stop_that_is_whole_first_however_it_comes(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    found = [(at + len(one), at) for one in stops if (at := text.find(one)) >= 0]
    for places in (sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)}), range(len(text) + 1)):
        stop = Stops(tuple(stops))
        told = "".join(stop.pass_on(text[a:b]) for a, b in itertools.pairwise(places)) + stop.rest()
        assert stop.met == bool(found)
        assert told == (text[: min(found)[1]] if found else text)


# ---------------------------------------------------------------- tokens and texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Texts(folder)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_a_text_comes_back_piece_by_piece(texts: Texts, theirs: Any, text: str) -> None:
    tokens = texts.tokens(text, special=False)
    reading = texts.reading()
    whole = theirs.decode(list(tokens))
    assert "".join(map(reading, tokens)) == whole.rstrip("\ufffd") or "\ufffd" in whole


def test_a_character_of_several_tokens_is_told_once_it_is_whole(texts: Texts) -> None:
    tokens = texts.tokens("a\N{SNOWMAN}b", special=False)
    pieces = list(map(texts.reading(), tokens))
    assert len(pieces) > 3 and "" in pieces
    assert "".join(pieces) == "a\N{SNOWMAN}b"


def test_bytes_that_never_make_a_character_do_not_hold_the_rest_back(texts: Texts) -> None:
    first, *_ = texts.tokens("\N{SNOWMAN}", special=False)
    reading = texts.reading()
    assert "".join(reading(first) for _ in range(40))
    assert "".join(map(reading, texts.tokens("end", special=False))).endswith("end")


def test_where_an_answer_ends_is_known_without_a_config(texts: Texts) -> None:
    from transformers import AutoTokenizer

    assert texts.end == {AutoTokenizer.from_pretrained(TINY, local_files_only=True).eos_token_id}


def test_a_chat_template_renders_as_transformers_does(texts: Texts, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    theirs.chat_template = (
        "{{ bos_token }}{% for m in messages %}\n  {%- if loop.first and m.role == 'system' %}{% continue %}{% endif %}"
        "<{{ m.role }}>{{ m.content | trim }}{{ {'a': '<é>'} | tojson }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    theirs.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " <b>hé</b> "}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert Texts(tmp_path).chat(messages) == Texts(tmp_path).tokens(str(expected), special=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no systems here') }}", "{% for %}", "{{ messages[99].content }}{{ 1/0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os.system('x') }}",
    ],
)  # fmt: skip
def test_a_template_that_fails_or_breaks_out_is_a_refusal(tmp_path: Path, template: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template"):
        Texts(tmp_path).chat([{"role": "user", "content": "x"}])


def test_without_a_tokenizer_only_tokens_are_understood(tmp_path: Path) -> None:
    bare = Texts(tmp_path)
    assert bare.end == frozenset()
    assert bare.reading()(5) == ""
    with pytest.raises(ValueError, match="token ids"):
        bare.tokens("x")
    with pytest.raises(ValueError, match="chat template"):
        bare.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "content", ["{", "[]", '"x"', "\udcff", "[" * 10**5, '{"eos_token_id": "x", "chat_template": 5}']
)
def test_damaged_files_beside_the_tokenizer_are_not_there(tmp_path: Path, content: str) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    assert Texts(tmp_path).end == frozenset()


# ---------------------------------------------------------------- drawing


def test_tokens_are_drawn_as_often_as_their_share() -> None:
    logits = numpy.log(numpy.array([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    share = numpy.bincount([sampler.draw(logits) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    cut = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=0))
    share = numpy.bincount([cut.draw(logits) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    cold = Sampler(Sampling(temperature=0.5, seed=0))
    share = numpy.bincount([cold.draw(logits) for _ in range(20_000)], minlength=4) / 20_000
    squares = numpy.array([0.25, 0.09, 0.0225, 0.0025])
    assert share == pytest.approx(squares / squares.sum(), abs=0.015)


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4) | st.just(-float("inf")), min_size=1, max_size=8).filter(lambda v: max(v) > -1e5),
    temperature=st.floats(0, 2), top_p=st.floats(1e-9, 1), seed=st.integers(0, 9),
)  # fmt: skip
def test_what_is_drawn_is_possible(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    token = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=seed)).draw(numpy.array(logits, numpy.float32))
    assert logits[token] > -float("inf")
