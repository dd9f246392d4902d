"""Plain, slow NumPy restatement of Domino, written only from the specification (docs/algorithm.md).

It is what faster code is tested against, so it favours being obviously right: one sequence at a time, no caches,
float64 throughout, everything recomputed from scratch. Weights are dicts of numpy arrays under their Hugging Face
names, matrices in HF layout [out, in]; configs are plain dicts as in config.json.

Letters: T tokens, D model width, V vocabulary, L tapped layers, M block size, J proposals of a block, U GRU width,
R head rank, P pure-draft prefix, a the absolute position of the anchor (the last committed token).

Not covered (a clear error instead): RoPE scaling other than YaRN and Llama 3.1's.
"""

import math

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# Small pieces
# ---------------------------------------------------------------------------------------------------------------


def f64(array):
    """Any numpy array (float16, float32, ...) as float64, the precision all of this file computes in."""
    return np.asarray(array).astype(np.float64)


def linear(x, weight, bias=None):
    """HF linear: x [..., in] and weight [out, in] (and bias [out]) give [..., out]."""
    return f64(x) @ f64(weight).T + (0.0 if bias is None else f64(bias))


def rms_norm(x, weight, eps):
    """RMSNorm (section 2) over the last axis: x / sqrt(mean(x^2) + eps) * weight."""
    x = f64(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * f64(weight)


def sigmoid(x):
    """The logistic function, written with tanh so that it never overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softmax(x):
    """Softmax over the last axis; entries of minus infinity get exactly 0."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def rope_settings(config):
    """RoPE base, kind and settings from either config spelling of section 2: `rope_theta` and `rope_scaling` at top
    level, or both inside `rope_parameters`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "yarn", "llama3"):
        raise NotImplementedError(f"reference.py knows plain RoPE, YaRN and Llama 3.1's, not {kind!r}")
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is None:
        raise ValueError("config has no rope_theta")
    return float(theta), kind, parameters


def yarn_frequencies(inverse_frequency, theta, yarn):
    """YaRN (Peng et al. 2023; section 2): inverse frequencies [H/2] to stretched ones [H/2], and the factor on cos and
    sin. Pairs that turn more than beta_fast times over the original positions keep their frequency, those that turn
    less than beta_slow times have it divided by the factor, and in between it goes over linearly by the pair's number;
    the ends of that ramp are rounded outwards unless `truncate` is false."""
    half, factor = len(inverse_frequency), yarn["factor"]

    def pair(turns):
        # The (real) number i of the pair with original / (2 pi theta^(2i/H)) = turns.
        return half * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * turns)) / math.log(theta)

    first, last = pair(yarn.get("beta_fast") or 32), pair(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    out = np.zeros(half)
    for i, frequency in enumerate(inverse_frequency):
        slow = min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0)
        out[i] = slow * frequency / factor + (1 - slow) * frequency
    attention = yarn.get("attention_factor")
    return out, 0.1 * math.log(factor) + 1 if attention is None else attention


def llama3_frequencies(inverse_frequency, llama3):
    """Llama 3.1's (section 2): inverse frequencies [H/2] to others. By wavelength in tokens: those beyond original /
    low_freq_factor are divided by the factor, those below original / high_freq_factor stay, those between are mixed."""
    out, original = np.zeros(len(inverse_frequency)), llama3["original_max_position_embeddings"]
    low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
    for i, frequency in enumerate(inverse_frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            out[i] = frequency / llama3["factor"]
        elif wavelength < original / high:
            out[i] = frequency
        else:
            smooth = (original / wavelength - low) / (high - low)
            out[i] = (1 - smooth) * frequency / llama3["factor"] + smooth * frequency
    return out


def rope(x, positions, config):
    """RoPE (section 2) on x [T, heads, H] at absolute positions [T]: element i is rotated with element i + H/2."""
    half = x.shape[-1] // 2
    theta, kind, settings = rope_settings(config)
    inverse_frequency, factor = theta ** (-np.arange(half, dtype=np.float64) / half), 1.0  # theta^(-2i/H)
    if kind == "yarn":
        inverse_frequency, factor = yarn_frequencies(inverse_frequency, theta, settings)
    if kind == "llama3":
        inverse_frequency = llama3_frequencies(inverse_frequency, settings)
    angle = np.asarray(positions, dtype=np.float64)[:, None] * inverse_frequency[None, :]  # [T, H/2]
    cos, sin = factor * np.cos(angle)[:, None, :], factor * np.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q, k, v, visible):
    """Grouped-query attention (section 2): q [T, N, H], k and v [S, K, H], visible [T, S] booleans -> [T, N, H].

    Query head n reads KV head n // (N/K); the scale is 1/sqrt(H).
    """
    n_heads, head_dim = q.shape[1], q.shape[2]
    group = n_heads // k.shape[1]
    out = np.zeros_like(q)
    for n in range(n_heads):
        scores = q[:, n] @ k[:, n // group].T / math.sqrt(head_dim)
        scores = np.where(visible, scores, -np.inf)
        out[:, n] = softmax(scores) @ v[:, n // group]
    return out


def mlp(weights, prefix, x):
    """SwiGLU (section 2) of what `prefix` names: down(silu(gate(x)) * up(x)), [T, D] -> [T, D]."""
    gate = linear(x, weights[prefix + "gate_proj.weight"])
    up = linear(x, weights[prefix + "up_proj.weight"])
    return linear(silu(gate) * up, weights[prefix + "down_proj.weight"])


def layer_mlp(weights, prefix, config, x):
    """The MLP of the layer named by `prefix`, [T, D] -> [T, D]: one, or where the layer has a router (section 2, MoE)
    the sum of the likeliest experts' by their probabilities, which `norm_topk_prob` makes sum to one."""
    if prefix + "mlp.gate.weight" not in weights:
        return mlp(weights, prefix + "mlp.", x)
    likelihood = softmax(linear(x, weights[prefix + "mlp.gate.weight"]))  # [T, E]
    out = np.zeros_like(x)
    for t, row in enumerate(likelihood):
        chosen = np.argsort(-row, kind="stable")[: config["num_experts_per_tok"]]
        total = np.sum(row[chosen]) if config["norm_topk_prob"] else 1.0
        for e in chosen:
            out[t] += row[e] / total * mlp(weights, f"{prefix}mlp.experts.{e}.", x[t])
    return out


def project_heads(weights, prefix, config, name, x, positions):
    """One of q, k, v of a layer: x [T, D] -> [T, heads, H]; q and k get their per-head RMSNorm (not in Llama and Qwen2,
    which have no weights for it), then RoPE."""
    head_dim = config["head_dim"]
    heads = config["num_attention_heads"] if name == "q" else config["num_key_value_heads"]
    projection = f"{prefix}self_attn.{name}_proj."
    y = linear(x, weights[projection + "weight"], weights.get(projection + "bias")).reshape(len(x), heads, head_dim)
    if name == "v":
        return y
    if config.get("model_type") not in ("llama", "qwen2"):
        y = rms_norm(y, weights[f"{prefix}self_attn.{name}_norm.weight"], config["rms_norm_eps"])
    return rope(y, positions, config)


def output(weights, prefix, mixed):
    """o_proj of a layer: [T, N*H] -> [T, D]."""
    return linear(mixed, weights[prefix + "self_attn.o_proj.weight"], weights.get(prefix + "self_attn.o_proj.bias"))


def target_embedding(weights):
    """The target's embedding table [V, D], which the drafter uses too (section 3)."""
    return f64(weights["model.embed_tokens.weight"])


def target_lm_head(weights, config):
    """The target's LM head [V, D]: the embedding table itself where the config ties them (section 2)."""
    if config.get("tie_word_embeddings", False):
        return target_embedding(weights)
    return f64(weights["lm_head.weight"])


def target_layer_ids(draft_cfg):
    """The target layers the drafter reads (end of section 2): the config's list, or the rule used when it is absent."""
    ids = (draft_cfg.get("dflash_config") or {}).get("target_layer_ids", draft_cfg.get("target_layer_ids"))
    if ids is not None:
        return list(ids)
    n, layers = draft_cfg["num_target_layers"], draft_cfg["num_hidden_layers"]
    if layers == 1:
        return [n // 2]
    return [round(1 + i * (n - 4) / (layers - 1)) for i in range(layers)]


# ---------------------------------------------------------------------------------------------------------------
# Target
# ---------------------------------------------------------------------------------------------------------------


def target_forward(weights, config, ids, taps):
    """Section 2: the whole causal target on ids [T] at positions 0 ... T-1. Returns logits [T, V] and features
    [T, L*D], the concatenation over `taps` (0-based layer numbers, in that order) of the residual stream after that
    layer, before any norm; only the very last layer's entry is taken after the final norm, as in HF."""
    ids = np.asarray(ids, dtype=np.int64)
    length, eps, layers = len(ids), config["rms_norm_eps"], config["num_hidden_layers"]
    positions = np.arange(length)
    causal = positions[None, :] <= positions[:, None]  # [query, key]
    x = target_embedding(weights)[ids]
    after_layer = []
    for i in range(layers):
        prefix = f"model.layers.{i}."
        y = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        q = project_heads(weights, prefix, config, "q", y, positions)
        k = project_heads(weights, prefix, config, "k", y, positions)
        v = project_heads(weights, prefix, config, "v", y, positions)
        mixed = attention(q, k, v, causal).reshape(length, -1)
        x = x + output(weights, prefix, mixed)
        y = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        x = x + layer_mlp(weights, prefix, config, y)
        after_layer.append(x)
    final = rms_norm(x, weights["model.norm.weight"], eps)
    after_layer[layers - 1] = final  # HF's last hidden_states entry is after the norm
    logits = linear(final, target_lm_head(weights, config))
    taps = list(taps)
    features = np.concatenate([after_layer[i] for i in taps], axis=-1) if taps else np.zeros((length, 0))
    return logits, features


def dual_view_block(weights, config, view, mask_token, size, ids, a):
    """Section 11: logits [M, V] of the block [ids[a], MASK, ...] through Orthrus's second view, without a cache.

    The text before the anchor runs through the target's own projections, the block through the second ones (`view`, by
    their names in the files); every row of the block sees all of the text and all of the block."""
    eps, embed = config["rms_norm_eps"], target_embedding(weights)
    text, x = embed[np.asarray(ids[:a], np.int64)], embed[[ids[a]] + [mask_token] * (size - 1)]
    before, places = np.arange(a), np.arange(a, a + size)
    second = {name.replace("_diff", ""): tensor for name, tensor in view.items()}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        norm = weights[prefix + "input_layernorm.weight"]
        y, own = rms_norm(text, norm, eps), rms_norm(x, norm, eps)
        k, v = (project_heads(weights, prefix, config, name, y, before) for name in "kv")
        q = project_heads(weights, prefix, config, "q", y, before)
        if a:
            text = text + output(weights, prefix, attention(q, k, v, before <= before[:, None]).reshape(a, -1))
            after = rms_norm(text, weights[prefix + "post_attention_layernorm.weight"], eps)
            text = text + layer_mlp(weights, prefix, config, after)
        q2, k2, v2 = (project_heads(second, prefix, config, name, own, places) for name in "qkv")
        seen = np.concatenate([k, k2]), np.concatenate([v, v2])
        mixed = attention(q2, *seen, np.ones((size, a + size), bool)).reshape(size, -1)
        x = x + output(second, prefix, mixed)
        x = x + layer_mlp(
            weights, prefix, config, rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        )
    return linear(rms_norm(x, weights["model.norm.weight"], eps), target_lm_head(weights, config))


# ---------------------------------------------------------------------------------------------------------------
# Drafter
# ---------------------------------------------------------------------------------------------------------------


def draft_block(draft_w, draft_cfg, embed, features, anchor_token, a, block_size=None):
    """Section 3: the draft backbone's one pass over one block. embed [V, D] is the target's table, features
    [a, L*D] those of positions 0 ... a-1 (a may be 0), anchor_token the token at position a. The block's input is
    [anchor, MASK, ..., MASK], M rows (config `block_size` unless given) at positions a ... a+M-1. Returns
    z [M, D], after the drafter's final norm."""
    size = draft_cfg["block_size"] if block_size is None else block_size
    eps, embed = draft_cfg["rms_norm_eps"], f64(embed)
    if embed.shape[1] != draft_cfg["hidden_size"]:
        raise ValueError("the drafter's width differs from the target's")
    if len(features) != a:
        raise ValueError(f"anchor at {a} needs exactly {a} context positions, got {len(features)}")
    mask_token = draft_cfg["dflash_config"]["mask_token_id"]

    fc = f64(draft_w["fc.weight"])
    features = f64(features).reshape(a, fc.shape[1])
    context = rms_norm(linear(features, fc), draft_w["hidden_norm.weight"], eps)  # [a, D]
    x = embed[[anchor_token] + [mask_token] * (size - 1)]  # [M, D]
    block_positions = a + np.arange(size)
    all_positions = np.arange(a + size)  # context, then block

    layer_types = draft_cfg.get("layer_types") or ["full_attention"] * draft_cfg["num_hidden_layers"]
    for i in range(draft_cfg["num_hidden_layers"]):
        prefix = f"layers.{i}."
        visible = np.ones((size, a + size), dtype=bool)
        if layer_types[i] == "sliding_attention":
            distance = block_positions[:, None] - all_positions[None, :]  # q - k
            visible = (distance >= 0) & (distance < draft_cfg["sliding_window"])
            if draft_cfg.get("is_causal") is False:  # DFlash 2: as far ahead as back
                visible = np.abs(distance) < draft_cfg["sliding_window"]
        elif draft_cfg["dflash_config"].get("causal_head"):  # JetSpec: a row sees the context and no later row
            visible = block_positions[:, None] >= all_positions[None, :]
        y = rms_norm(x, draft_w[prefix + "input_layernorm.weight"], eps)
        into, out_of = convolutions(draft_w, draft_cfg, prefix + "attention_conv.", y)
        y = into(y)
        keys_from = np.concatenate([context, y], axis=0)  # the context side is c as it is, in every layer
        q = project_heads(draft_w, prefix, draft_cfg, "q", y, block_positions)
        k = project_heads(draft_w, prefix, draft_cfg, "k", keys_from, all_positions)
        v = project_heads(draft_w, prefix, draft_cfg, "v", keys_from, all_positions)
        mixed = attention(q, k, v, visible).reshape(size, -1)
        x = x + out_of(output(draft_w, prefix, mixed))
        y = rms_norm(x, draft_w[prefix + "post_attention_layernorm.weight"], eps)
        into, out_of = convolutions(draft_w, draft_cfg, prefix + "mlp_conv.", y)
        x = x + out_of(mlp(draft_w, prefix + "mlp.", into(y)))
    return rms_norm(x, draft_w["norm.weight"], eps)


def convolutions(draft_w, draft_cfg, prefix, x):
    """Section 3, DFlash 2: the two functions around a sublayer, of whose input x [M, D] both have their filters."""
    taps, group = (draft_cfg["dflash_config"].get(name) for name in ("conv_kernel_size", "conv_group_size"))
    if not taps:
        return (lambda v: v), (lambda v: v)
    base, (rows, width) = f64(draft_w[prefix + "base_kernel"]), x.shape
    moving = linear(x, draft_w[prefix + "kernel_projection.weight"]).reshape(rows, 2, taps, width // group)

    def side(number):
        def convolve(v):
            out = np.zeros_like(v)
            for t in range(rows):
                for tap in range(min(taps, t + 1)):
                    for c in range(width):
                        out[t, c] += (base[number, tap, c] + moving[t, number, tap, c // group]) * v[t - tap, c]
            return out

        return convolve

    return side(0), side(1)


def has_head(draft_cfg):
    """Section 4: whether the checkpoint has the causal head (`projector_type` "domino"; absent: plain DFlash)."""
    return (draft_cfg.get("dflash_config") or {}).get("projector_type") == "domino"


def has_markov(draft_cfg):
    """Section 4: whether the checkpoint has DSpark's head (`projector_type` "dspark")."""
    return (draft_cfg.get("dflash_config") or {}).get("projector_type") == "dspark"


def markov_correction(draft_w, draft_cfg, before, z):
    """Section 4: what DSpark's head adds to the base logits of each place: before, a list of n tokens (the anchor,
    then proposals), z [n, D] of the places after them -> [n, V]."""
    kind = draft_cfg["dflash_config"]["markov_head_type"]
    w1, w2 = f64(draft_w["markov_head.markov_w1.weight"]), f64(draft_w["markov_head.markov_w2.weight"])
    added, state = [], np.zeros(w1.shape[1])
    for token, z_j in zip(before, f64(z), strict=True):
        rank = w1[int(token)]
        if kind == "gated":
            name = "markov_head.gate_proj."
            joined = np.concatenate([z_j, rank])
            rank = sigmoid(linear(joined, draft_w[name + "weight"], draft_w[name + "bias"])) * rank
        if kind == "rnn":
            name = "markov_head.joint_proj."
            joined = np.concatenate([state, rank, z_j])
            gate, new, out = np.split(linear(joined, draft_w[name + "weight"], draft_w[name + "bias"]), 3)
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(new)
            rank = np.tanh(out)
        added.append(w2 @ rank)
    return np.array(added)


def markov_confidence(draft_w, before, z):
    """How likely each proposal is to be accepted, if those before it are: before and z as in `markov_correction`."""
    rows = f64(draft_w["markov_head.markov_w1.weight"])[[int(token) for token in before]]
    weight = f64(draft_w["confidence_head.proj.weight"])
    joined = np.concatenate([f64(z), rows], axis=1)[:, : weight.shape[1]]  # without the rows where it takes none
    return sigmoid(linear(joined, weight, draft_w["confidence_head.proj.bias"])[:, 0])


def has_selector(draft_cfg):
    """Section 4: whether the checkpoint has DFlash 2's path selector."""
    return bool((draft_cfg.get("dflash_config") or {}).get("selector_top_k"))


def selector_logits(draft_w, draft_cfg, base_j, z_j, before, label=None):
    """Section 4: DFlash 2's scores of one proposal, base_j [V] and z_j [D] of its row and the token before it: [V],
    -inf but for the k likeliest of base_j. In training the label takes the last place where it is not among them."""
    name = "candidate_selector."
    likeliest = np.argsort(-f64(base_j), kind="stable")[: draft_cfg["dflash_config"]["selector_top_k"]]
    if label is not None and label not in likeliest:
        likeliest[-1] = label
    pair = f64(draft_w[name + "predecessor_codebook"])[int(before)]
    pair = pair * linear(z_j, draft_w[name + "hidden_projection.weight"])
    scores = np.full(len(base_j), -np.inf)
    scores[likeliest] = f64(base_j)[likeliest] + f64(draft_w[name + "successor_codebook"])[likeliest] @ pair
    return scores


def proposal_rows(draft_cfg, block_size=None):
    """Section 4: the block rows that make proposals 1 ... J, as a list of J ints. With `shift_label` proposal j comes
    from row j-1 and J = M; without (and when absent) from row j and J = M-1, row 0 being unused."""
    size = draft_cfg["block_size"] if block_size is None else block_size
    if (draft_cfg.get("dflash_config") or {}).get("shift_label", False):
        return list(range(size))
    return list(range(1, size))


def gru_step(draft_w, x, h):
    """Section 4: one GRU step, input x [D] (an embedding) and state h [U] to the new state [U]; gates in PyTorch's
    order reset, update, new; no biases."""
    x_r, x_z, x_n = np.split(f64(draft_w["prefix_gru.weight_ih_l0"]) @ f64(x), 3)
    h_r, h_z, h_n = np.split(f64(draft_w["prefix_gru.weight_hh_l0"]) @ f64(h), 3)
    r = sigmoid(x_r + h_r)
    u = sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    return (1.0 - u) * n + u * h


def gru_states(draft_w, embed, realised_tokens):
    """Section 4: the GRU from h = 0 over the target's embeddings (embed [V, D]) of realised_tokens, a list whose
    first entry is the anchor. Returns the list of states [U], one after each token: entry j-1 is h_j, which corrects
    proposal j, when the tokens are [anchor, proposal 1, ..., proposal J-1]."""
    h = np.zeros(f64(draft_w["prefix_gru.weight_hh_l0"]).shape[1])
    states = []
    for token in realised_tokens:
        h = gru_step(draft_w, f64(embed[int(token)]), h)
        states.append(h)
    return states


def head_correction(draft_w, z_j, h_j):
    """Section 4: what the head adds to one proposal's base logits, embed_proj.2(SiLU(embed_proj.0([z_j ; h_j]))):
    z_j [D] and h_j [U] -> [V]."""
    joined = np.concatenate([f64(z_j), f64(h_j)])
    return linear(silu(linear(joined, draft_w["embed_proj.0.weight"])), draft_w["embed_proj.2.weight"])


def corrected_logits(draft_w, draft_cfg, base, z, states):
    """Section 4: base [J, V], z [J, D] (the rows that make proposals 1 ... J) and J GRU states [U] to the final
    logits [J, V]. The first P (`pure_draft_prefix_len`) keep their base logits; a drafter without the head returns
    base as it is, and `states` is then not looked at."""
    final = f64(base).copy()
    if not has_head(draft_cfg):
        return final
    for j in range(prefix_length(draft_cfg, len(final)), len(final)):
        final[j] = final[j] + head_correction(draft_w, z[j], states[j])
    return final


def prefix_length(draft_cfg, proposals):
    """Section 4: P, the number of first proposals left to the base logits; 0 when absent, and 0 <= P < J required."""
    p = (draft_cfg.get("dflash_config") or {}).get("pure_draft_prefix_len", 0) or 0
    if not 0 <= p < proposals:
        raise ValueError(f"pure_draft_prefix_len {p} is not in 0 ... {proposals - 1}")
    return p


def propose_greedy(draft_w, draft_cfg, embed, lm_head, features, anchor_token, a):
    """Step 1 of section 5 (sections 3 and 4), greedy: embed and lm_head [V, D] are the target's, features [a, L*D].
    Walks the block left to right, the GRU eating the anchor and then each chosen token. Returns the list of J
    drafted ids (argmax, ties to the lowest id) and the final logits [J, V] they were chosen from."""
    z = draft_block(draft_w, draft_cfg, embed, features, anchor_token, a)
    z = z[proposal_rows(draft_cfg)]  # [J, D]
    logits = linear(z, draft_w.get("lm_head.weight", lm_head))  # [J, V], of a reduced vocabulary as many as it has
    head = has_head(draft_cfg)
    p = prefix_length(draft_cfg, len(z)) if head else 0
    h = np.zeros(np.asarray(draft_w["prefix_gru.weight_hh_l0"]).shape[1]) if head else None
    token, drafts = int(anchor_token), []
    for j in range(len(z)):  # j here is proposal j + 1
        if head:
            h = gru_step(draft_w, f64(embed[token]), h)  # now has eaten the anchor and all earlier proposals
            if j >= p:
                logits[j] = logits[j] + head_correction(draft_w, z[j], h)
        if has_markov(draft_cfg):
            before = [int(anchor_token), *drafts]
            logits[j] = logits[j] + markov_correction(draft_w, draft_cfg, before, z[: j + 1])[j]
        if has_selector(draft_cfg):
            logits[j] = selector_logits(draft_w, draft_cfg, logits[j], z[j], token)
        token = int(np.argmax(logits[j]))
        token += int(draft_w["d2t"][token]) if "d2t" in draft_w else 0
        drafts.append(token)
    return drafts, logits


# ---------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------


def commit(tokens, new, max_new_tokens, stop_ids):
    """Section 5's output rule: append `new` to the list `tokens` one by one, ending at the first stop token (kept,
    "stop") or at max_new_tokens exactly ("length"). A stop token that is also the last allowed one counts as "stop".
    Returns the finish reason or None."""
    for token in new:
        if len(tokens) >= max_new_tokens:
            return "length"
        tokens.append(int(token))
        if int(token) in stop_ids:
            return "stop"
        if len(tokens) >= max_new_tokens:
            return "length"
    return None


def autoregressive_greedy(target_w, target_cfg, prompt, max_new_tokens, stop_ids):
    """Plain greedy decoding by the target alone (what section 6 says greedy output must equal): prompt is a list of
    ids. Returns dict(tokens = generated ids without the prompt, finish_reason "stop" or "length")."""
    stop_ids, tokens = set(stop_ids), []
    reason = "length" if max_new_tokens <= 0 else None
    while reason is None:
        logits, _ = target_forward(target_w, target_cfg, list(prompt) + tokens, [])
        reason = commit(tokens, [int(np.argmax(logits[-1]))], max_new_tokens, stop_ids)
    return {"tokens": tokens, "finish_reason": reason}


def decode_greedy(target_w, target_cfg, draft_w, draft_cfg, prompt, max_new_tokens, stop_ids):
    """Section 5 with section 6's greedy acceptance, naively: the target is run from scratch over everything each
    cycle. prompt is a list of ids. Returns dict(tokens = generated ids without the prompt, accepted = m of each
    cycle, acceptance_lengths = m + 1 of each cycle (whole even where the output was cut), finish_reason "stop" or
    "length"). The prefill's token belongs to no cycle."""
    stop_ids, taps = set(stop_ids), target_layer_ids(draft_cfg)
    embed, lm_head = target_embedding(target_w), target_lm_head(target_w, target_cfg)
    tokens, accepted = [], []
    reason = "length" if max_new_tokens <= 0 else None
    if reason is None:  # prefill
        logits, _ = target_forward(target_w, target_cfg, prompt, taps)
        reason = commit(tokens, [int(np.argmax(logits[-1]))], max_new_tokens, stop_ids)
    while reason is None:
        committed = list(prompt) + tokens  # t_0 ... t_a
        a = len(committed) - 1
        # 1. Draft, from the features of positions 0 ... a-1 and the anchor t_a.
        _, features = target_forward(target_w, target_cfg, committed[:a], taps)
        drafts, _ = propose_greedy(draft_w, draft_cfg, embed, lm_head, features, committed[a], a)
        # 2. Verify: choices[i] is the target's token for position a+i+1 given everything before it.
        logits, _ = target_forward(target_w, target_cfg, committed + drafts, taps)
        choices = [int(t) for t in np.argmax(logits[a:], axis=-1)]  # J + 1 of them
        # 3. Accept while the draft equals the target's argmax; the bonus follows the last accepted one.
        m = 0
        while m < len(drafts) and drafts[m] == choices[m]:
            m += 1
        accepted.append(m)
        reason = commit(tokens, [*drafts[:m], choices[m]], max_new_tokens, stop_ids)
    lengths = [m + 1 for m in accepted]
    return {"tokens": tokens, "accepted": accepted, "acceptance_lengths": lengths, "finish_reason": reason}


# ---------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------


def filtered_probabilities(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Section 6's filters in transformers' order (temperature, top-k, top-p, min-p): logits [V] -> probabilities [V].
    Temperature 0 is one-hot on the argmax (lowest id on ties). Top-k (0: off) keeps every id tied with the k-th.
    Top-p (1: off) works on the softmax of what top-k left and keeps, from the likeliest down (lower id first among
    equals), each id whose predecessors' mass is below top_p, so at least one. Min-p (0: off) works on the softmax of
    what is left and keeps ids with at least min_p times the greatest probability."""
    scores = f64(logits).copy()
    if temperature == 0:
        one_hot = np.zeros_like(scores)
        one_hot[int(np.argmax(scores))] = 1.0
        return one_hot
    scores = scores / temperature
    if top_k > 0:
        kth = np.sort(scores)[::-1][min(top_k, len(scores)) - 1]
        scores[scores < kth] = -np.inf
    if top_p < 1.0:
        probabilities = softmax(scores)
        order = np.argsort(-probabilities, kind="stable")
        mass_before = 0.0
        for rank, token in enumerate(order):
            if rank > 0 and mass_before >= top_p:
                scores[token] = -np.inf
            mass_before += probabilities[token]
    if min_p > 0.0:
        probabilities = softmax(scores)
        scores[probabilities < min_p * np.max(probabilities)] = -np.inf
    return softmax(scores)


def residual(p, q):
    """Section 6: what to draw from after a rejection, norm(max(p - q, 0)), for one position's target distribution
    p [V] and draft distribution q [V], both after the filters; p itself where that is empty. Returns [V]."""
    p, q = f64(p), f64(q)
    rest = np.maximum(p - q, 0.0)
    total = np.sum(rest)
    if total <= 0.0:
        return p / np.sum(p)
    return rest / total


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def cross_entropy(logits, label):
    """-log softmax(logits)[label] for logits [V]."""
    top = np.max(logits)
    return float(top + np.log(np.sum(np.exp(logits - top))) - logits[label])


def block_acceptance(correct, supervised):
    """Section 7's estimated acceptance length of one block: 1 + length of the correct prefix over proposals 1 ... J,
    where an unsupervised row lets the prefix pass but does not count. Two lists of J booleans -> int."""
    length = 1
    for is_correct, is_supervised in zip(correct, supervised, strict=False):
        if not is_supervised:
            continue
        if not is_correct:
            break
        length += 1
    return length


def divergence_from(logits, distribution):
    """The forward KL, sum of p (log p - log q): from the distribution p [V] to q = softmax(logits), logits [V]."""
    return float(sum(p * (math.log(p) + cross_entropy(logits, v)) for v, p in enumerate(distribution) if p > 0))


def position_weights(kind, probabilities, supervised, gamma, alpha):
    """The weight of each proposal of a block, a list of J floats, 0 where unsupervised.

    "uniform": all 1. "exponential": exp(-(j-1)/gamma). "d-pace" (arXiv 2605.18810, equations 7 and 8), from the
    probabilities q_j of the labels: q~ = (1-alpha) q + alpha, and w_j the sum over m >= j of the product of q~_i over
    i <= m; unsupervised proposals are left out of sums and products alike."""
    if kind == "uniform":
        return [float(on) for on in supervised]
    if kind == "exponential":
        return [math.exp(-j / gamma) if on else 0.0 for j, on in enumerate(supervised)]
    places = [j for j, on in enumerate(supervised) if on]
    smooth = {j: (1.0 - alpha) * probabilities[j] + alpha for j in places}
    weights = [0.0] * len(supervised)
    for j in places:
        weights[j] = sum(math.prod(smooth[i] for i in places if i <= m) for m in places if m >= j)
    return weights


SUM_KEYS = (
    "weight_sum",
    "final_loss_sum",
    "base_loss_sum",
    "final_ce_sum",
    "base_ce_sum",
    "label_count",
    "final_correct",
    "base_correct",
    "block_count",
    "final_accept_sum",
    "base_accept_sum",
    "confidence_sum",
)


def combine_training(parts, lam):
    """Section 7: join the sums of several `training_loss` results (or of none) into the loss and report over all of
    them: CE = sum of weighted ce / sum of weights, 0 if empty; loss = (1 - lam) CE(final) + lam CE(base)."""
    out: dict[str, float] = {key: sum(part[key] for part in parts) for key in SUM_KEYS}

    def ratio(numerator, denominator):
        return out[numerator] / out[denominator] if out[denominator] > 0 else 0.0

    for branch in ("final", "base"):
        out[branch + "_loss"] = ratio(branch + "_loss_sum", "weight_sum")
        out[branch + "_ce"] = ratio(branch + "_ce_sum", "weight_sum")
        out[branch + "_accuracy"] = ratio(branch + "_correct", "label_count")
        out[branch + "_accept"] = ratio(branch + "_accept_sum", "block_count")
    out["confidence_loss"] = ratio("confidence_sum", "weight_sum")
    out["loss"] = (1.0 - lam) * out["final_loss"] + lam * out["base_loss"] + out["confidence_loss"]
    return out


CONFIDENT = ("tv", "dspark", "acceptance")  # objectives that a confidence head is trained with


def training_loss(
    target_w,
    target_cfg,
    draft_w,
    draft_cfg,
    ids,
    loss_mask,
    anchors,
    gamma,
    lam,
    weights="exponential",
    alpha=0.5,
    objective="ce",
    kept=None,
):
    """Section 7 for ONE sequence: ids [T], loss_mask [T] (1 on assistant tokens) and a given list of anchor
    positions, one at a time. Proposal j (1 ... J) of anchor a is labelled with ids[a+j] and has weight
    exp(-(j-1)/gamma), or 0 where that is beyond the sequence or off the mask; the GRU is teacher-forced with
    ids[a], ids[a+1], ... . Returns a dict with loss, final_ce, base_ce, final_accept, base_accept (mean estimated
    acceptance length over blocks with a supervised row), final_accuracy, base_accuracy (unweighted, over supervised
    labels), weight_sum, and the sums to join several sequences with `combine_training`: final_ce_sum, base_ce_sum
    (weighted), label_count, final_correct, base_correct, block_count, final_accept_sum, base_accept_sum.

    With weights "d-pace" each branch has weights of its own (see `position_weights`) and weight_sum counts the blocks
    with a supervised row. With objective "kl" the loss is not ce but the KL from the target's distribution at position
    a+j-1, which predicts ids[a+j].

    The other objectives, with t half the sum of |q - p| over the vocabulary: "tv", t; "dspark" (heads.md 1.4), 0.1 ce +
    1.8 t, where no proposal counts after the first that is off the mask, plus, with a confidence head, the binary
    cross-entropy of its σ to 1 - t of the final branch; "acceptance", minus the sum over j of the product of 1 - t_i
    over i <= j, the proposals that are off the mask left out of both, divided by the blocks. The differences that check
    gradients may not move the confidence's labels: `kept` gives them, one list of J for each anchor."""
    ids = [int(t) for t in ids]
    length = len(ids)
    embed, lm_head = target_embedding(target_w), target_lm_head(target_w, target_cfg)
    target_logits, features = target_forward(target_w, target_cfg, ids, target_layer_ids(draft_cfg))
    rows = proposal_rows(draft_cfg)
    sums: dict[str, float] = dict.fromkeys(SUM_KEYS, 0.0)
    found: list = []
    for a in anchors:
        a = int(a)
        z = draft_block(draft_w, draft_cfg, embed, features[:a], ids[a], a)[rows]  # [J, D]
        base = linear(z, lm_head)  # [J, V]
        # h_j has eaten ids[a] ... ids[a+j-1]. Past the end any id does: those rows' labels are past it too.
        eaten = [ids[a + j] if a + j < length else 0 for j in range(len(rows))]
        states = gru_states(draft_w, embed, eaten) if has_head(draft_cfg) else None
        final = corrected_logits(draft_w, draft_cfg, base, z, states)
        if has_markov(draft_cfg):
            final = base + markov_correction(draft_w, draft_cfg, eaten, z)
        if has_selector(draft_cfg):
            labels = [ids[a + j] if a + j < length else 0 for j in range(1, len(rows) + 1)]
            final = np.stack(
                [selector_logits(draft_w, draft_cfg, *row) for row in zip(base, z, eaten, labels, strict=True)]
            )

        supervised = [a + j < length and bool(loss_mask[a + j]) for j in range(1, len(rows) + 1)]
        if objective == "dspark":
            supervised = [all(supervised[:j]) for j in range(1, len(rows) + 1)]
        for branch, logits in (("final", final), ("base", base)):
            ce, loss, right = [0.0] * len(rows), [0.0] * len(rows), [False] * len(rows)
            variation = [0.0] * len(rows)
            for j in range(1, len(rows) + 1):
                if supervised[j - 1]:
                    ce[j - 1] = cross_entropy(logits[j - 1], ids[a + j])
                    right[j - 1] = int(np.argmax(logits[j - 1])) == ids[a + j]
                    if branch == "final" and has_selector(draft_cfg):
                        proposed = selector_logits(draft_w, draft_cfg, base[j - 1], z[j - 1], eaten[j - 1])
                        right[j - 1] &= bool(np.isfinite(proposed[ids[a + j]]))
                    loss[j - 1] = ce[j - 1]
                    theirs = softmax(target_logits[a + j - 1])
                    variation[j - 1] = t = 0.5 * np.abs(softmax(logits[j - 1]) - theirs).sum()
                    if objective == "kl":
                        loss[j - 1] = divergence_from(logits[j - 1], theirs)
                    if objective in ("tv", "dspark"):
                        loss[j - 1] = t if objective == "tv" else 0.1 * ce[j - 1] + 1.8 * t
            w = position_weights(weights, [math.exp(-c) for c in ce], supervised, gamma, alpha)
            if objective == "acceptance":
                places = [j for j, on in enumerate(supervised) if on]
                lengths = [math.prod(1 - variation[i] for i in places if i <= j) for j in places]
                sums[branch + "_loss_sum"] -= sum(lengths)
            else:
                sums[branch + "_loss_sum"] += sum(x * y for x, y in zip(w, loss, strict=True))
            if branch == "final" and "confidence_head.proj.weight" in draft_w and objective in CONFIDENT:
                labels = [1 - t for t in variation] if kept is None else kept[len(found)]
                found.append(labels)
                sure = markov_confidence(draft_w, eaten, z)
                for weight, c, label in zip(w, sure, labels, strict=True):
                    sums["confidence_sum"] -= weight * (label * math.log(c) + (1 - label) * math.log(1 - c))
            sums[branch + "_ce_sum"] += sum(x * y for x, y in zip(w, ce, strict=True))
            sums[branch + "_correct"] += sum(right)
            if any(supervised):
                sums[branch + "_accept_sum"] += block_acceptance(right, supervised)
        sums["label_count"] += sum(supervised)
        sums["block_count"] += any(supervised)
        sums["weight_sum"] += any(supervised) if weights == "d-pace" or objective == "acceptance" else sum(w)
    return combine_training([sums], lam) | {"kept": found}
