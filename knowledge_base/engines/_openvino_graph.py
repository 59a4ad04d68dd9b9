"""A transformers causal language model as an OpenVINO graph: operators written one by one, no tracing.

The graph has the inputs and the output of every text generation model of OpenVINO (`input_ids`, `attention_mask`,
`position_ids`, `beam_idx`; `logits`), and holds the KV cache as state, so OpenVINO GenAI and its server read it as well.
Every matrix is stored in the model's own dtype and the arithmetic is written in float32; what is computed in fewer bits
is decided where the graph is compiled. Sizes are those of the tensors, so layers may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.engines._openvino_library import HEAD, openvino
from knowledge_base.errors import CandidateFailed

if TYPE_CHECKING:
    from openvino import Model, Node

FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
POSITIONS = "transformer.wpe"  # a table of learnt positions: a vector for each, like norms and biases
HIDDEN_FROM = -65504.0  # added to the score of what a token must not see; finite, and within float16


def build(model: Any) -> tuple[Model, list[Any]]:
    """Return the graph of a model, and the arrays its constants stand in: they must live as long as it.

    Raises:
        CandidateFailed: "unsupported", a structure this graph has no operators for.
    """
    writer = _WRITERS.get(model.config.model_type)
    if writer is None:
        raise unsupported(f"architecture `{model.config.model_type}` (known: {', '.join(_WRITERS)})")
    if empty := next((name for name, weight in model.named_parameters() if not weight.numel()), None):
        raise unsupported(f"the matrix `{empty}`, of which pruning left nothing")  # it crashes as it compiles this
    graph = _Graph()
    hidden = writer(graph, model)
    logits = graph.linear(hidden, model.lm_head, HEAD)
    return graph.finished(logits), graph.held


def unsupported(what: str) -> CandidateFailed:
    """Return the refusal of something that has no form in the graph."""
    return CandidateFailed(
        "unsupported", f"OpenVINO cannot be given {what}", hint="plan this with the transformers engine"
    )


class _Graph:
    """What all architectures are made of. States are (batch, tokens, hidden) in float32."""

    def __init__(self) -> None:
        self.ops: Any = openvino().opset15
        self.ids = self._input("input_ids", "i64", 2)
        self.given = self._input("attention_mask", "i64", 2)
        self.positions = self._input("position_ids", "i64", 2)
        self.order = self._input("beam_idx", "i32", 1)
        self.held: list[Any] = []
        self._sinks: list[Node] = []
        self._stored: dict[tuple[int, torch.Size], Node] = {}  # tied tables are stored once
        self._masks: dict[int | None, Node] = {}

    def finished(self, logits: Node) -> Model:
        """Return the graph with this output."""
        result = self.ops.result(logits, name="logits")
        result.output(0).get_tensor().set_names({"logits"})
        inputs = [self.ids, self.given, self.positions, self.order]
        return openvino().Model([result], self._sinks, inputs, "leanplan")

    def numbers(self, values: Any, kind: str = "i64") -> Node:
        """Return a small constant."""
        return self.ops.constant(values, getattr(openvino().Type, kind))

    def weight(self, tensor: torch.Tensor, name: str, *, turned: bool = False) -> Node:
        """Return a tensor as a float32 value, stored in its own dtype; `turned`: as its transpose."""
        key = (tensor.data_ptr(), tensor.shape)
        if key not in self._stored:
            kind = FORMATS.get(tensor.dtype)
            if kind is None:
                raise unsupported(f"weights of {str(tensor.dtype).removeprefix('torch.')} (`{name}`)")
            plain = (tensor.T if turned else tensor).detach().cpu().contiguous()
            bits = plain.view(torch.int16).numpy() if kind == "bf16" else plain.numpy()
            self.held.append(bits)
            library = openvino()
            node = library.op.Constant(library.Tensor(bits, list(bits.shape), getattr(library.Type, kind)), True)
            node.set_friendly_name(name)
            self._stored[key] = node if kind == "f32" else self.ops.convert(node, "f32", name=f"{name}.float32")
        return self._stored[key]

    def linear(self, states: Node, module: Any, name: str) -> Node:
        """Return x W^T + b of a linear layer, or of the two a factorised one is made of."""
        if getattr(module, "kind", None) == "low_rank":
            return self.linear(self.linear(states, module.reduce, f"{name}.reduce"), module.expand, name)
        if type(module) not in (nn.Linear, Conv1D):
            raise unsupported(f"the module `{name}` ({type(module).__name__})")
        weight = self.weight(module.weight, f"{name}.weight", turned=isinstance(module, Conv1D))
        product = self.ops.matmul(states, weight, False, True, name=name)
        bias = module.bias
        return product if bias is None else self.ops.add(product, self.weight(bias, f"{name}.bias"))

    def embedded(self, module: Any, ids: Node, name: str) -> Node:
        """Return the rows of an embedding table."""
        if type(module) is not nn.Embedding:
            raise unsupported(f"the module `{name}` ({type(module).__name__})")
        return self.ops.gather(self.weight(module.weight, f"{name}.weight"), ids, self.numbers(0), name=name)

    def rms_norm(self, states: Node, module: Any, name: str) -> Node:
        """Return x / sqrt(mean(x^2) + eps) * w."""
        ops = self.ops
        square = ops.power(states, self.numbers(2.0, "f32"))
        mean = ops.reduce_mean(square, self.numbers([-1]), True)
        root = ops.sqrt(ops.add(mean, self.numbers(module.variance_epsilon, "f32")))
        scaled = ops.multiply(states, ops.divide(self.numbers(1.0, "f32"), root))
        return ops.multiply(self.weight(module.weight, f"{name}.weight"), scaled)

    def layer_norm(self, states: Node, module: Any, name: str) -> Node:
        """Return (x - mean) / sqrt(variance + eps) * w + b."""
        normed = self.ops.mvn(states, self.numbers([-1]), True, module.eps, "inside_sqrt")
        scaled = self.ops.multiply(normed, self.weight(module.weight, f"{name}.weight"))
        return self.ops.add(scaled, self.weight(module.bias, f"{name}.bias"))

    def rotary(self, module: Any, size: int) -> tuple[Node, Node]:
        """Return cosine and sine of each position, (batch, 1, tokens, size), of the frequencies the model itself uses."""
        ops = self.ops
        if 2 * len(module.inv_freq) != size:
            raise unsupported(f"rotary position encoding of {2 * len(module.inv_freq)} of {size} channels")
        if module.rope_type in ("dynamic", "longrope"):
            raise unsupported(f"rotary position encoding of type `{module.rope_type}`: it changes with the length")
        places = ops.unsqueeze(ops.convert(self.positions, "f32"), self.numbers([1, 3]))
        frequencies = module.inv_freq.detach().float().cpu().numpy()
        angles = ops.multiply(places, ops.constant(frequencies.reshape(1, 1, 1, -1)))
        both = ops.concat([angles, angles], -1)
        scale = self.numbers(float(module.attention_scaling), "f32")
        cosine, sine = ops.cos(both), ops.sin(both)
        if float(module.attention_scaling) != 1.0:
            cosine, sine = ops.multiply(cosine, scale), ops.multiply(sine, scale)
        return cosine, sine

    def rotated(self, states: Node, cosine: Node, sine: Node, size: int) -> Node:
        """Return heads (batch, heads, tokens, head) turned by their positions; pairs are half a head apart."""
        ops = self.ops
        parts = ops.variadic_split(states, self.numbers(3), self.numbers([size // 2, size - size // 2]))
        low, high = parts.output(0), parts.output(1)
        turned = ops.concat([ops.multiply(high, self.numbers(-1.0, "f32")), low], -1)
        return ops.add(ops.multiply(states, cosine), ops.multiply(turned, sine))

    def heads(self, states: Node, count: int, size: int) -> Node:
        """Return (batch, tokens, count x size) as (batch, tokens, count, size)."""
        return self.ops.reshape(states, self.numbers([0, 0, count, size]), True)

    def attention(
        self, query: Node, key: Node, value: Node, *, layer: int, groups: int, size: int, scale: float,
        window: int | None,
    ) -> Node:  # fmt: skip
        """Return what each token takes from those before it, (batch, tokens, heads x size); key and value go to the cache.

        Query, key and value are (batch, heads, tokens, size); `groups` query heads share a key head.
        """
        ops = self.ops
        seen = [self._cached(x, f"past_key_values.{layer}.{what}", f"present.{layer}.{what}")
                for x, what in ((key, "key"), (value, "value"))]  # fmt: skip
        if groups > 1:
            heads = key.get_output_partial_shape(0)[1].get_length() * groups
            seen = [
                ops.reshape(
                    ops.broadcast(
                        ops.unsqueeze(x, self.numbers([2])), self.numbers([1, 1, groups, 1, 1]),
                        broadcast_spec="BIDIRECTIONAL",
                    ),
                    self.numbers([0, heads, -1, size]), True,
                )
                for x in seen
            ]  # fmt: skip
        taken = ops.scaled_dot_product_attention(query, *seen, self._mask(window), self.numbers(scale, "f32"))
        return ops.reshape(ops.transpose(taken, self.numbers([0, 2, 1, 3])), self.numbers([0, 0, -1]), True)

    def _cached(self, new: Node, past: str, present: str) -> Node:
        """Return what the cache holds, in the order of the beams, followed by `new`; both are the cache from then on."""
        ops = self.ops
        _, heads, _, size = (d.get_length() if d.is_static else -1 for d in new.get_output_partial_shape(0))
        batch = ops.gather(ops.shape_of(self.ids), self.numbers([0]), self.numbers(0))
        shape = ops.concat([batch, self.numbers([heads]), self.numbers([0]), self.numbers([size])], 0)
        nothing = ops.broadcast(self.numbers(0.0, "f32"), shape)
        library = openvino()
        kept = ops.read_value(nothing, past + present, library.Type.f32, library.PartialShape([-1, heads, -1, size]))
        both = ops.concat([ops.gather(kept, self.order, self.numbers(0)), new], 2)
        self._sinks.append(ops.assign(both, past + present))
        return both

    def _mask(self, window: int | None) -> Node:
        """Return (batch, 1, tokens, all tokens): 0 where a token sees another, HIDDEN_FROM where not."""
        if window not in self._masks:
            ops = self.ops
            count = ops.gather(ops.shape_of(self.given), self.numbers(1), self.numbers(0))
            new = ops.gather(ops.shape_of(self.ids), self.numbers(1), self.numbers(0))
            one = self.numbers(1)
            columns = ops.range(self.numbers(0), count, one, "i64")
            rows = ops.unsqueeze(ops.range(ops.subtract(count, new), count, one, "i64"), self.numbers([1]))
            seen = ops.less_equal(columns, rows)
            if window is not None:
                seen = ops.logical_and(seen, ops.greater(columns, ops.subtract(rows, self.numbers(window))))
            given = ops.unsqueeze(ops.convert(self.given, "boolean"), self.numbers([1, 2]))
            seen = ops.logical_and(ops.unsqueeze(seen, self.numbers([0, 1])), given)
            self._masks[window] = ops.select(seen, self.numbers(0.0, "f32"), self.numbers(HIDDEN_FROM, "f32"))
        return self._masks[window]

    def _input(self, name: str, kind: str, dimensions: int) -> Any:
        node = self.ops.parameter([-1] * dimensions, getattr(openvino().Type, kind), name=name)
        node.output(0).get_tensor().set_names({name})
        return node


def _llama(graph: _Graph, model: Any) -> Node:
    """Llama and its kin: norms before attention and before a gated FFN, rotary positions."""
    ops, config, body = graph.ops, model.config, model.model
    if config.hidden_act != "silu":
        raise unsupported(f"`{config.model_type}` with activation `{config.hidden_act}`")
    hidden = graph.embedded(body.embed_tokens, graph.ids, "model.embed_tokens")
    cosine, sine = graph.rotary(body.rotary_emb, body.layers[0].self_attn.head_dim)
    for number, layer in enumerate(body.layers):
        name = f"model.layers.{number}"
        attention, size = layer.self_attn, layer.self_attn.head_dim
        states = graph.rms_norm(hidden, layer.input_layernorm, f"{name}.input_layernorm")
        query, key, value = (
            graph.linear(states, getattr(attention, f"{x}_proj"), f"{name}.self_attn.{x}_proj") for x in "qkv"
        )
        key_heads = _width(key) // size
        query, key, value = (graph.heads(x, _width(x) // size, size) for x in (query, key, value))
        if hasattr(attention, "q_norm"):
            query = graph.rms_norm(query, attention.q_norm, f"{name}.self_attn.q_norm")
            key = graph.rms_norm(key, attention.k_norm, f"{name}.self_attn.k_norm")
        query, key, value = (ops.transpose(x, graph.numbers([0, 2, 1, 3])) for x in (query, key, value))
        taken = graph.attention(
            graph.rotated(query, cosine, sine, size), graph.rotated(key, cosine, sine, size), value,
            layer=number, groups=_width(query, 1) // key_heads, size=size, scale=attention.scaling,
            window=_window(config, number),
        )  # fmt: skip
        hidden = ops.add(hidden, graph.linear(taken, attention.o_proj, f"{name}.self_attn.o_proj"))
        states = graph.rms_norm(hidden, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
        gate = ops.swish(graph.linear(states, layer.mlp.gate_proj, f"{name}.mlp.gate_proj"))
        up = graph.linear(states, layer.mlp.up_proj, f"{name}.mlp.up_proj")
        hidden = ops.add(hidden, graph.linear(ops.multiply(gate, up), layer.mlp.down_proj, f"{name}.mlp.down_proj"))
    return graph.rms_norm(hidden, body.norm, "model.norm")


def _gpt2(graph: _Graph, model: Any) -> Node:
    """GPT-2: learnt positions, one product for query, key and value, norms that subtract the mean."""
    ops, config, body = graph.ops, model.config, model.transformer
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise unsupported(f"gpt2 with activation `{config.activation_function}`")
    if config.add_cross_attention:
        raise unsupported("gpt2 with cross-attention")
    hidden = ops.add(
        graph.embedded(body.wte, graph.ids, "transformer.wte"),
        graph.embedded(body.wpe, graph.positions, POSITIONS),
    )
    for number, layer in enumerate(body.h):
        name = f"transformer.h.{number}"
        attention, size = layer.attn, layer.attn.head_dim
        states = graph.layer_norm(hidden, layer.ln_1, f"{name}.ln_1")
        parts = ops.split(graph.linear(states, attention.c_attn, f"{name}.attn.c_attn"), graph.numbers(2), 3)
        query, key, value = (
            ops.transpose(graph.heads(parts.output(i), attention.num_heads, size), graph.numbers([0, 2, 1, 3]))
            for i in range(3)
        )
        taken = graph.attention(
            query, key, value, layer=number, groups=1, size=size, scale=attention.scaling, window=None
        )
        hidden = ops.add(hidden, graph.linear(taken, attention.c_proj, f"{name}.attn.c_proj"))
        states = graph.layer_norm(hidden, layer.ln_2, f"{name}.ln_2")
        inner = ops.gelu(graph.linear(states, layer.mlp.c_fc, f"{name}.mlp.c_fc"), "tanh")
        hidden = ops.add(hidden, graph.linear(inner, layer.mlp.c_proj, f"{name}.mlp.c_proj"))
    return graph.layer_norm(hidden, body.ln_f, "transformer.ln_f")


def _width(states: Node, axis: int = -1) -> int:
    """Return how many numbers a state has along an axis."""
    shape = states.get_output_partial_shape(0)
    return int(shape[axis % len(shape)].get_length())


def _window(config: Any, layer: int) -> int | None:
    """Return how many tokens back a layer sees, or None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return window if config.model_type == "mistral" else None
    return window if kinds[layer] == "sliding_attention" else None


_WRITERS: dict[str, Callable[[_Graph, Any], Node]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "gpt2": _gpt2,
}  # fmt: skip
