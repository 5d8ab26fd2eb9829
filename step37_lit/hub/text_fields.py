"""The `text_config` of a `config.json` in both layouts -> `TextConfig`. See `config_json` for the rules."""

from __future__ import annotations

from typing import Any, cast

from step37_lit.config import ATTENTION_KINDS, AttentionKind, Llama3Scaling, RopeConfig, TextConfig
from step37_lit.hub.fields import JsonFields, boolean, integer, list_of, number, text

TEXT_IRRELEVANT = (
    "architectures", "auto_map", "dtype", "model_type", "output_router_logits", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache",
    # superseded by the explicit list in moe_layers_enum
    "moe_every_n_layer", "moe_layer_offset",
)  # fmt: skip

DEFAULT = TextConfig()
# Rotary embedding of a kind of attention that no layer has: never computed with, the same in both layouts.
UNUSED_ROPE = RopeConfig(theta=1e4, rotary_factor=1.0)


def read_text_config(fields: JsonFields, root: JsonFields) -> TextConfig:
    """Reads the text part; `root` may hold `rope_scaling` in its place (hub layout).

    Raises:
        ConfigError: a field is missing or inconsistent.
    """
    layers, mtp = fields.take("num_hidden_layers", integer), _mtp_layers(fields)
    in_transformers = fields.has("rope_parameters")
    kinds = _layer_types(fields, layers, mtp, in_transformers)
    head_dim = fields.take("head_dim", integer)
    groups = fields.first_of(("num_key_value_heads", "num_attention_groups"), integer)
    heads = fields.take("num_attention_heads", integer)
    ropes = _transformers_ropes(fields, kinds) if in_transformers else _hub_ropes(fields, root, kinds, layers)
    config = TextConfig(
        vocab_size=fields.take("vocab_size", integer),
        hidden_size=fields.take("hidden_size", integer),
        ffn_hidden_size=fields.take("intermediate_size", integer),
        num_layers=layers,
        num_mtp_layers=mtp,
        layer_types=kinds,
        num_heads=heads,
        num_sliding_heads=_sliding_heads(fields, heads, groups, head_dim, kinds[:layers]),
        num_kv_groups=groups,
        head_dim=head_dim,
        sliding_window=fields.take("sliding_window", integer, DEFAULT.sliding_window),
        full_rope=ropes["full_attention"],
        sliding_rope=ropes["sliding_attention"],
        max_position=fields.first_of(("max_position_embeddings", "max_seq_len"), integer),
        norm_eps=fields.take("rms_norm_eps", number, DEFAULT.norm_eps),
        moe_layers=_moe_layers(fields, layers, mtp),
        num_experts=fields.first_of(("n_routed_experts", "moe_num_experts"), integer, DEFAULT.num_experts),
        top_k=fields.first_of(("num_experts_per_tok", "moe_top_k"), integer, DEFAULT.top_k),
        expert_ffn_size=fields.take("moe_intermediate_size", integer, DEFAULT.expert_ffn_size),
        shared_expert_ffn_size=fields.first_of(
            ("share_expert_dim", "share_expert_dims"), integer, DEFAULT.shared_expert_ffn_size
        ),
        router_scaling_factor=fields.take("moe_router_scaling_factor", number, 1.0),
        swiglu_limits=_limits(fields, "swiglu_limits", layers, mtp),
        swiglu_limits_shared=_limits(fields, "swiglu_limits_shared", layers, mtp),
        init_std=fields.take("initializer_range", number, DEFAULT.init_std),
    )
    _check_fixed(fields, config)
    fields.read.update(TEXT_IRRELEVANT)
    return config


def _check_fixed(fields: JsonFields, config: TextConfig) -> None:
    """What the model has in one form only."""
    fields.fixed(
        att_impl_type="GQA",
        attention_bias=False,
        attention_dropout=(0.0, 0),
        hidden_act="silu",
        mlp_bias=False,
        query_pre_attn_scalar=(config.head_dim, float(config.head_dim)),
        sink=False,
        tie_word_embeddings=False,
        use_head_wise_attn_gate=True,
        use_mfa=False,
        use_qk_norm=True,
        zero_centered=True,
    )
    # The router's settings mean something only where there are routed experts.
    router = {"moe_router_activation": "sigmoid", "need_fp32_gate": True, "norm_expert_weight": True}
    router["use_moe_router_bias"] = True
    fields.read.update(router)
    if config.moe_layers:
        fields.fixed(**router)
    if fields.has("use_rope_layers"):
        flags = fields.take("use_rope_layers", list_of(lambda f, n, v: v))
        fields.require(all(flags), "use_rope_layers", "an empty list or 1 for every layer", flags)
    fields.read.add("use_rope_layers")


def _mtp_layers(fields: JsonFields) -> int:
    return fields.first_of(("num_nextn_predict_layers", "num_mtp_layers"), integer, 0)


def _layer_types(fields: JsonFields, layers: int, mtp: int, in_transformers: bool) -> tuple[AttentionKind, ...]:
    kinds = fields.take("layer_types", list_of(text))
    expected = layers if in_transformers else layers + mtp
    fields.require(len(kinds) == expected, "layer_types", f"{expected} entries", len(kinds))
    if in_transformers:
        trailing = fields.take("mtp_layer_types", list_of(text), [])
        fields.require(len(trailing) == mtp, "mtp_layer_types", f"{mtp} entries (MTP layers)", len(trailing))
        kinds = kinds + trailing
    for i, kind in enumerate(kinds):
        fields.require(kind in ATTENTION_KINDS, f"layer_types[{i}]", " or ".join(ATTENTION_KINDS), kind)
    return tuple(cast(AttentionKind, kind) for kind in kinds)


def _sliding_heads(fields: JsonFields, heads: int, groups: int, head_dim: int, kinds: tuple[AttentionKind, ...]) -> int:
    """Query heads of sliding layers: `attention_other_setting` (hub) or `num_sliding_attention_heads`."""
    sliding = fields.take("num_sliding_attention_heads", integer, heads)
    if fields.has("attention_other_setting"):
        other = fields.section("attention_other_setting")
        sliding = other.take("num_attention_heads", integer)
        other.fixed(
            attention_type="sliding_attention", num_attention_groups=groups, head_dim=head_dim, true_head_dim=head_dim
        )
        other.done()
    fields.read.add("attention_other_setting")
    # Only layers that differ from num_attention_heads stand there, by a number with leading zeros.
    odd = {i for i, kind in enumerate(kinds) if kind == "sliding_attention" and sliding != heads}
    found = fields.take("per_layer_config", _by_layer, None)
    if found is not None:
        expected = {layer: {"num_attention_heads": sliding} for layer in odd}
        fields.require(found == expected, "per_layer_config", f"{sliding} heads on the sliding layers", found)
    return sliding


def _by_layer(fields: JsonFields, name: str, value: Any) -> dict[int, Any]:
    """An object with layer numbers as names."""
    fields.require(isinstance(value, dict) and all(map(str.isdigit, value)), name, "an object by layer number", value)
    return {int(layer): entry for layer, entry in value.items()}


def _moe_layers(fields: JsonFields, layers: int, mtp: int) -> tuple[int, ...]:
    """Indices from `mlp_layer_types` (transformers) or `moe_layers_enum` (hub: "3,4,5" or a list)."""
    uses_moe = fields.take("use_moe", boolean, True)
    trailing = fields.take("mtp_mlp_layer_types", list_of(text), ["dense"] * mtp)
    fields.require(trailing == ["dense"] * mtp, "mtp_mlp_layer_types", f"{mtp} x dense", trailing)
    if fields.has("mlp_layer_types"):
        kinds = fields.take("mlp_layer_types", list_of(text))
        fields.require(len(kinds) == layers, "mlp_layer_types", f"{layers} entries", len(kinds))
        for i, kind in enumerate(kinds):
            fields.require(kind in ("dense", "sparse"), f"mlp_layer_types[{i}]", "dense or sparse", kind)
        found = tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    elif uses_moe or fields.has("moe_layers_enum"):
        found = fields.take("moe_layers_enum", _layer_numbers)
    else:
        found = ()
    fields.read.update(("mlp_layer_types", "moe_layers_enum"))
    fields.require(uses_moe or not found, "use_moe", "true (moe_layers_enum names layers)", uses_moe)
    return found


def _layer_numbers(fields: JsonFields, name: str, value: Any) -> tuple[int, ...]:
    """`"3,4,5"` or `[3, 4, 5]`, ascending."""
    if isinstance(value, list):
        return tuple(list_of(integer)(fields, name, value))
    items = [item.strip() for item in text(fields, name, value).split(",") if item.strip()]
    for item in items:
        fields.require(item.isdigit(), name, "layer numbers with commas between", value)
    return tuple(int(item) for item in items)


def _limits(fields: JsonFields, name: str, layers: int, mtp: int) -> tuple[float | None, ...]:
    """Clamps of each layer; null and 0 mean none. `transformers` drops the entries of MTP layers: none there."""

    def limit(fields: JsonFields, name: str, value: Any) -> float | None:
        return (number(fields, name, value) or None) if value is not None else None

    found = fields.take(name, list_of(limit), [None] * (layers + mtp))
    sizes = (layers, layers + mtp)
    fields.require(len(found) in sizes, name, " or ".join(f"{n} entries" for n in sorted(set(sizes))), len(found))
    return tuple(found + [None] * (layers + mtp - len(found)))


def _hub_ropes(
    fields: JsonFields, root: JsonFields, kinds: tuple[AttentionKind, ...], layers: int
) -> dict[AttentionKind, RopeConfig]:
    """`rope_theta` and `partial_rotary_factors` a layer (or one theta for all); `rope_scaling` on `yarn_only_types`."""
    thetas = _per_layer(fields, "rope_theta", kinds, layers)
    factors = _per_layer(fields, "partial_rotary_factors", kinds, layers, default=1.0)
    holder = fields if fields.has("rope_scaling") else root
    scaling = _llama3(holder.section("rope_scaling")) if holder.has("rope_scaling") else None
    for section in (fields, root):
        section.read.add("rope_scaling")
    scaled_kinds = fields.take("yarn_only_types", list_of(text), ["full_attention"])
    for name in scaled_kinds:
        fields.require(name in ATTENTION_KINDS, "yarn_only_types", " or ".join(ATTENTION_KINDS), name)
    return {
        kind: RopeConfig(thetas[kind], factors[kind], scaling if kind in scaled_kinds else None)
        if kind in thetas
        else UNUSED_ROPE
        for kind in ATTENTION_KINDS
    }


def _per_layer(
    fields: JsonFields, name: str, kinds: tuple[AttentionKind, ...], layers: int, default: float | None = None
) -> dict[AttentionKind, float]:
    """The value of each kind of attention that occurs: from a list with an entry a layer, or one number for all."""

    def values(fields: JsonFields, name: str, value: Any) -> list[float]:
        if not isinstance(value, list):
            return [number(fields, name, value)] * len(kinds)
        return list_of(number)(fields, name, value)

    found = fields.take(name, values) if default is None else fields.take(name, values, [default] * len(kinds))
    sizes = (layers, len(kinds))
    fields.require(len(found) in sizes, name, " or ".join(f"{n} entries" for n in sorted(set(sizes))), len(found))
    by_kind: dict[AttentionKind, float] = {}
    for i, (kind, value) in enumerate(zip(kinds, found, strict=False)):
        expected = by_kind.setdefault(kind, value)
        fields.require(value == expected, f"{name}[{i}]", f"{expected:g} as on the other {kind} layers", value)
    return by_kind


def _llama3(fields: JsonFields) -> Llama3Scaling | None:
    """llama3 scaling, or None for the type `default`."""
    rope_type = fields.first_of(("rope_type", "type"), text)
    if rope_type == "default":
        return None
    fields.require(rope_type == "llama3", "rope_type", "llama3 or default", rope_type)
    scaling = Llama3Scaling(
        factor=fields.take("factor", number),
        original_max_position=fields.take("original_max_position_embeddings", integer),
        low_freq_factor=fields.take("low_freq_factor", number),
        high_freq_factor=fields.take("high_freq_factor", number),
    )
    fields.done(("rope_theta", "partial_rotary_factor"))  # the reader of `rope_parameters` has taken these
    return scaling


def _transformers_ropes(fields: JsonFields, kinds: tuple[AttentionKind, ...]) -> dict[AttentionKind, RopeConfig]:
    """`rope_parameters`: one object for each kind of attention that occurs."""
    section = fields.section("rope_parameters")
    ropes: dict[AttentionKind, RopeConfig] = {}
    for kind in ATTENTION_KINDS:
        if section.has(kind):
            rope = section.section(kind)
            theta = rope.take("rope_theta", number)
            factor = rope.take("partial_rotary_factor", number, 1.0)
            ropes[kind] = RopeConfig(theta, factor, _llama3(rope))
            rope.done()
        else:
            decoder_kinds = sorted(set(kinds))
            section.require(kind not in kinds, kind, f"an object for each of {decoder_kinds}", "no such field")
            ropes[kind] = UNUSED_ROPE
    section.done()
    # Kept by `transformers` where it was read from the hub's layout.
    scaled = [kind for kind, rope in ropes.items() if rope.scaling is not None]
    for name in fields.take("yarn_only_types", list_of(text), list(map(str, scaled))):
        fields.require(not scaled or name in scaled, "yarn_only_types", f"{scaled} as in rope_parameters", name)
    return ropes
