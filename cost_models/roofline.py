"""The physics: time as the slower of reading and computing, memory as a sum, power as idle plus activity.

Every function takes floats or numpy arrays (one entry for each plan) and returns the same. The roofline is
Williams et al. 2009, doi:10.1145/1498765.1498785; efficiencies below peak come from efficiency.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models import offloading
from cost_models.engine_memory import beside_bytes, copies_bytes

if TYPE_CHECKING:
    from cost_models.case import Case

# Rows in a product, up to which `Rates.few_rows_share` holds, and how the share grows with more of them, full at about 65. Eight
# were measured; that a line serves to 16 and prompts of 64 tokens have the whole rate is all that is known of the rest.
FEW_ROWS, FEW_ROWS_GROWTH = 16, 0.6
# Of a float32 number of recurrent state, for each token: what it decays to, decay and product into it, product out of it.
STATE_FLOP_PER_BYTE = 6 / 4
FEW_ROWS_LOG_SD = 0.5  # of the share: its quartiles are 0.24 and 0.6

Parts = dict[str, Any]  # name of a part -> seconds or bytes, float or array; they add up to the whole


def expert_share_read(case: Case, tokens: Any) -> Any:
    """Return the share of the layers' weights one step reads when `tokens` tokens go through it.

        1 - e (1 - k / E)^tokens        e: experts' share of the weights, k of E experts chosen by each token

    1 for a dense model; a batch wakes more experts (independent, uniform routing assumed).

    >>> from types import SimpleNamespace as S
    >>> moe = S(experts=8, experts_active=2, params_total=46.7e9, params_active=12.9e9)
    >>> round(float(expert_share_read(S(model=moe, demand=S(linear_params=46.4e9)), 1)), 2)
    0.27
    """
    experts, active = case.model.experts, case.model.experts_active
    routed = experts > active
    idle = np.where(routed, 1 - active / np.maximum(experts, 1), 0.0)
    idle_params = case.model.params_total - case.model.params_active
    share = np.where(routed, np.minimum(idle_params / np.maximum(idle, 1e-9) / case.demand.linear_params, 1.0), 0.0)
    return 1 - share * idle**tokens


def causal_pairs(tokens: Any, window: Any) -> Any:
    """Return the (query, key) pairs of one prompt under causal attention with a sliding window (inf: none).

    >>> float(causal_pairs(4, 2.0)), float(causal_pairs(4, float("inf")))
    (7.0, 10.0)
    """
    near = np.minimum(tokens, window)
    return near * (near + 1) / 2 + (tokens - near) * near


def near_tokens(case: Case, tokens: Any) -> Any:
    """Return how many of some tokens are seen and kept, in the mean over layers: no more than the window where it is.

    >>> from types import SimpleNamespace as S
    >>> half = S(model=S(window=1024.0, window_share=0.5))
    >>> float(near_tokens(half, 512)), float(near_tokens(half, 3072))
    (512.0, 2048.0)
    """
    share = case.model.window_share
    return (1 - share) * tokens + share * np.minimum(tokens, case.model.window)


def prompt_pairs(case: Case) -> Any:
    """Return the (query, key) pairs of one prompt, in the mean over layers: those with a window and those without."""
    tokens, kept, share = case.workload.prompt_tokens, case.reused_tokens, case.model.window_share
    whole, near = (causal_pairs(tokens, w) - causal_pairs(kept, w) for w in (np.inf, case.model.window))
    return case.demand.prompt_pairs_ratio * ((1 - share) * whole + share * near)


def new_tokens(case: Case) -> Any:
    """Return the tokens of one prompt that must be computed: those whose keys and values no earlier request left, (plans,)."""
    return np.maximum(case.workload.prompt_tokens - case.reused_tokens, 1.0)


def matrices_s(read_bytes: Any, flop: Any, case: Case) -> Any:
    """Return seconds for matrix products: the slower of reading the weights once and doing the arithmetic."""
    return np.maximum(read_bytes / case.rates.weights_bytes_per_s, flop / case.rates.flop_per_s)


def rows_worth(case: Case, rows: Any, *, routed: Any = 1.0) -> Any:
    """Return (plans,): as how many rows of a prompt the arithmetic of a product of so few rows counts.

        1 + (rows - 1) / s      s: `few_rows_share` up to FEW_ROWS rows, growing to 1 where they fill the kernels made for prompts

    On a CPU each of the first rows beyond one costs about twice what it does in a prompt, so drafts and small batches gain
    less there than on a GPU. Where each row is `routed` to that share of the matrices, their products have as many fewer.
    """
    each = np.maximum(rows * routed, 1.0)
    share = case.rates.few_rows_share * np.maximum(each / FEW_ROWS, 1.0) ** FEW_ROWS_GROWTH
    return rows / each * (1 + (each - 1) / np.minimum(share, 1.0))


def few_rows_log_sd(case: Case) -> Any:
    """Return (plans,): the doubt that `rows_worth` leaves of a decode step's matrices; 0 where they wait for reading."""
    demand, rates = case.demand, case.rates
    rows = demand.batch * demand.verified_tokens_per_step
    flop_s = (
        demand.linear_flop_per_token
        * demand.output_share
        * rows_worth(case, rows, routed=_routed(case))
        / rates.flop_per_s
    )
    read_s = demand.linear_bytes * demand.output_share * expert_share_read(case, rows) / rates.weights_bytes_per_s
    return np.where((rows > 1) & (rates.few_rows_share < 1) & (flop_s > read_s), FEW_ROWS_LOG_SD, 0.0)


def _routed(case: Case) -> Any:
    experts, active = case.model.experts, case.model.experts_active
    return np.where(experts > active, active / np.maximum(experts, 1), 1.0)


def prefill_parts(case: Case) -> Parts:
    """Return the parts of the seconds from the start of a batch's prefill to its first tokens.

    The weights are read once for each chunk of the prompt; attention computes every causal pair; the head is
    applied to the last position of each sequence. Left out: sampling, tokenising, queueing.
    """
    demand, rates = case.demand, case.rates
    prompt = new_tokens(case)
    tokens = demand.batch * prompt
    chunks = np.ceil(tokens / np.minimum(rates.prefill_chunk_tokens, tokens))
    read = demand.linear_bytes * demand.prompt_share * expert_share_read(case, tokens / chunks) * chunks
    first = _first_step(case)  # of a decoder's own weights, where another stack has read the prompt
    device = {
        "weights": matrices_s(read, demand.linear_flop_per_token * demand.prompt_share * tokens, case)
        + matrices_s(
            first * demand.linear_bytes, first * demand.linear_flop_per_token * rows_worth(case, demand.batch), case
        ),
        "head": matrices_s(demand.head_read_bytes, demand.head_flop_per_token * rows_worth(case, demand.batch), case),
        "attention": demand.batch * prompt_pairs(case) * demand.attention_flop_per_token_pair / rates.flop_per_s
        + demand.batch * prompt * demand.kv_bytes_per_token / rates.kv_bytes_per_s,
        "recurrent state": np.maximum(
            2 * demand.batch * case.model.state_bytes / rates.bytes_per_s,
            tokens * STATE_FLOP_PER_BYTE * case.model.state_bytes / rates.flop_per_s,
        ),
    }
    kernels = chunks * demand.kernels_per_step * demand.prompt_passes + prompt * demand.kernels_per_prompt_token
    passed = _with_host(device, kernels * rates.kernel_s + rates.step_s, rates)
    return passed | offloading.waiting(case, sum(passed.values()), passes=chunks)


def decode_parts(case: Case) -> Parts:
    """Return the parts of the seconds of one decode step at the request's mean context.

    Weights are read once for the batch, the cache once for each sequence. A step of speculation computes
    `verified_tokens_per_step` positions for `tokens_per_step` kept ones, and before it guesses them.
    """
    demand, rates = case.demand, case.rates
    positions = demand.batch * demand.verified_tokens_per_step
    context = mean_context(case)
    device = {
        "weights": matrices_s(
            demand.linear_bytes * demand.output_share * expert_share_read(case, positions),
            demand.linear_flop_per_token * demand.output_share * rows_worth(case, positions, routed=_routed(case)),
            case,
        ),
        "head": matrices_s(demand.head_read_bytes, demand.head_flop_per_token * rows_worth(case, positions), case),
        "KV cache": np.maximum(
            demand.batch
            * context
            * (demand.kv_bytes_per_token + demand.expanded_bytes_per_token)
            / rates.kv_bytes_per_s,
            context
            * (positions * demand.attention_flop_per_token_pair + demand.batch * demand.expanding_flop_per_token)
            / rates.flop_per_s,
        ),
        "recurrent state": np.maximum(
            2 * demand.batch * case.model.state_bytes / rates.bytes_per_s,
            positions * STATE_FLOP_PER_BYTE * case.model.state_bytes / rates.flop_per_s,
        ),
        "drafts": matrices_s(demand.draft_bytes_per_step, demand.draft_flop_per_step, case),
    }
    kernels = demand.kernels_per_step + demand.draft_kernels_per_step
    step = _with_host(device, kernels * rates.kernel_s + rates.step_s, rates)
    return step | offloading.waiting(case, sum(step.values()))


def _first_step(case: Case) -> Any:
    """Return the share of the layers' weights that the first output token goes through beside the prompt's own."""
    return np.where(case.demand.prompt_passes > 1, case.demand.output_share, 0.0)


def mean_context(case: Case) -> Any:
    """Return the tokens a query sees halfway through the output, in the mean over layers with a window and without."""
    return near_tokens(case, case.workload.prompt_tokens + case.workload.output_tokens / 2)


def _with_host(device: Parts, host_s: Any, rates: Any) -> Parts:
    # Where the host launches operators ahead of the device only its excess waits; else every gap adds to the time.
    busy = sum(device.values())
    return {**device, "engine overhead": np.where(rates.asynchronous > 0, np.maximum(host_s - busy, 0.0), host_s)}


def request_work(case: Case) -> tuple[Any, Any]:
    """Return (bytes read, flop) of one batch of requests from first to last token: what activity costs energy."""
    demand = case.demand
    prompt = new_tokens(case)
    steps = (case.workload.output_tokens - 1) / demand.tokens_per_step if case.decodes else 0.0
    positions = demand.batch * demand.verified_tokens_per_step
    context = mean_context(case)
    read = demand.linear_bytes * demand.prompt_share * expert_share_read(case, demand.batch * prompt)
    read = read + demand.head_read_bytes + _first_step(case) * demand.linear_bytes
    read = read + steps * (
        demand.linear_bytes * demand.output_share * expert_share_read(case, positions)
        + demand.head_read_bytes
        + demand.batch * context * (demand.kv_bytes_per_token + demand.expanded_bytes_per_token)
        + 2 * demand.batch * case.model.state_bytes
        + demand.draft_bytes_per_step
    )
    flop = demand.batch * prompt * demand.linear_flop_per_token * demand.prompt_share
    flop = flop + demand.batch * (demand.head_flop_per_token + _first_step(case) * demand.linear_flop_per_token)
    flop = flop + demand.batch * prompt * STATE_FLOP_PER_BYTE * case.model.state_bytes
    flop = flop + demand.batch * prompt_pairs(case) * demand.attention_flop_per_token_pair
    flop = flop + steps * (demand.draft_flop_per_step + demand.batch * context * demand.expanding_flop_per_token)
    flop = flop + steps * positions * (
        demand.linear_flop_per_token * demand.output_share
        + demand.head_flop_per_token
        + context * demand.attention_flop_per_token_pair
        + STATE_FLOP_PER_BYTE * case.model.state_bytes
    )
    return read, flop


def memory_parts(case: Case) -> Parts:
    """Return the parts of the highest memory of the serving process, in bytes.

    Activations are those of one prefill chunk of every sequence, logits those of the last positions in float32. What the
    runtime and its allocator hold was measured together: `engine`.
    """
    demand, rates = case.demand, case.rates
    prompt_tokens = demand.batch * case.workload.prompt_tokens
    live = np.minimum(prompt_tokens, rates.prefill_chunk_tokens)
    parts = {
        "weights": weights_bytes(case) + beside_bytes(case) - offloading.saved_bytes(case),
        "kernels' copies of weights": copies_bytes(case),
        "KV cache": cache_bytes(case),
        "activations": live * demand.activation_bytes_per_token + _expanded_bytes(case),
        "logits": 4.0 * demand.batch * case.model.vocab_size,
        "engine": rates.runtime_bytes,
    }
    if not case.decodes:  # states come out, no tokens
        del parts["KV cache"], parts["logits"]
    return parts


def _expanded_bytes(case: Case) -> Any:
    """Return the bytes of one layer's keys and values while they are made from a latent cache, at full length."""
    demand = case.demand  # what is written and read at each step, of all layers
    kept = case.workload.prompt_tokens + case.workload.output_tokens
    return demand.batch * kept * demand.expanded_bytes_per_token / (2 * demand.layers)


def weights_bytes(case: Case) -> Any:
    """Return the bytes of all stored weights."""
    demand = case.demand
    return demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes


def cache_bytes(case: Case) -> Any:
    """Return the bytes of cache and recurrent state of the batch at full prompt and output length."""
    kept = near_tokens(case, case.workload.prompt_tokens + case.workload.output_tokens)
    return case.demand.batch * (kept * case.demand.kv_bytes_per_token + case.model.state_bytes)


def power_w(idle_w: Any, busy_w: Any, memory_share: Any, compute_share: Any, *, base: float) -> Any:
    """Return mean watts while serving, never power cap x time.

        idle + (busy - idle) min(1, base + 0.3 memory_share + 0.45 compute_share)

    `base`: share of the span a device draws as soon as it runs anything (0.35 on accelerators, 0.6 on CPUs).
    The weights reproduce the flat curve of measured serving power (ML.ENERGY v3, Apache-2.0: a B200 of 1000 W
    draws 450 W at batch 8 and 690 W at batch 2043); GenZ splits board power into like shares.

    >>> round(float(power_w(120, 1000, 0.15, 0.0, base=0.35))), round(float(power_w(120, 1000, 0.5, 0.3, base=0.35)))
    (468, 679)
    """
    return idle_w + (busy_w - idle_w) * np.minimum(1.0, base + 0.3 * memory_share + 0.45 * compute_share)
