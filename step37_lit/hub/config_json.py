"""`config.json` of a hub folder -> `Step37Config`.

Two layouts of the same facts are read, the hub's own and the one that `transformers` writes; they are told apart by
`text_config.rope_parameters`, which only the latter has. Fields that the model computes with are taken; fields whose
meaning is fixed in the model (a gate a head, sigmoid router, ...) must have the one supported value; fields without
influence on what is computed stand in the `*_IRRELEVANT` lists; every other field is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step37_lit.config import Step37Config, TokenIds, VisionConfig
from step37_lit.errors import ConfigError
from step37_lit.hub.fields import JsonFields, boolean, integer, integers, number, parse_json_object
from step37_lit.hub.text_fields import read_text_config
from step37_lit.hub.text_files import CONFIG_FILE, PREPROCESSOR_FILE, TOKENIZER_FILE
from step37_lit.text_file import read_bytes
from step37_lit.tokenizer import added_tokens

ROOT_IRRELEVANT = (
    "architectures", "auto_map", "dtype", "model_type", "pad_token_id", "torch_dtype", "transformers_version",
)  # fmt: skip
# The table of positions follows from image_size and patch_size, whatever max_position_embeddings says.
VISION_IRRELEVANT = ("dtype", "max_position_embeddings", "model_type", "torch_dtype", "transformers_version")

PROCESSOR_FILES = (PREPROCESSOR_FILE, "processor_config.json")
PROCESSOR_TYPE = "Step3p7ImageProcessor"
IMAGE_TOKEN_NAMES = ("im_start", "im_patch", "im_end", "patch_start", "patch_newline", "patch_end")


def read_hub_config(path: str | Path) -> Step37Config:
    """Reads a hub folder or its `config.json`.

    Token ids: `image_token_id` is `<im_patch>`. The other five image tokens come from fields named
    `im_start_token_id`, `im_end_token_id`, `patch_start_token_id`, ... where they are there, else from the added
    tokens of a `tokenizer.json` beside the file, else they stand at the published distances from `<im_patch>`
    (`<im_start>` one before it, the others behind it, see `TokenIds`). Without `bos_token_id` the model has no
    beginning token (None), without `eos_token_id` no ending ones.

    The side of multicrop patches is the image processor's `patch_size`, where a `preprocessor_config.json` or
    `processor_config.json` of `transformers` is beside the file, else the published one.

    Raises:
        ConfigError: a field is unknown, missing or inconsistent; names file and field.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    names = (TOKENIZER_FILE, *PROCESSOR_FILES)
    beside = {name: read_bytes(file.parent / name) for name in names if (file.parent / name).is_file()}
    return parse_hub_config(read_bytes(file), file, beside)


def parse_hub_config(content: bytes, file: Path, beside: Mapping[str, bytes]) -> Step37Config:
    """`read_hub_config` of contents.

    Args:
        content: Of `config.json`.
        file: Its path, for messages.
        beside: Contents of the other files of its folder by name.

    Raises:
        ConfigError: see `read_hub_config`.
    """
    root = JsonFields(parse_json_object(content, file), "", file)
    try:
        return _read_root(root, beside)
    except ConfigError as error:
        if error.file is not None:
            raise
        # raised by the config's own checks, which do not know of files
        raise ConfigError(error.field_name, error.expected, error.found, file) from error


def _read_root(root: JsonFields, beside: Mapping[str, bytes]) -> Step37Config:
    vision = _read_vision(root.section("vision_config"), root.file.parent, beside)
    text_fields = root.section("text_config")
    text = read_text_config(text_fields, root)
    tokens = _read_tokens(root, text_fields, beside)
    root.fixed(
        tie_word_embeddings=False,
        im_start_token="<im_start>",
        im_patch_token="<im_patch>",
        im_end_token="<im_end>",
        image_token_len=vision.num_tokens(vision.image_size),
        understand_projector_stride=2,
        use_im_start_end=(True, "true"),
        vision_select_layer=-1,
    )
    root.fixed(hidden_size=text.hidden_size)  # some files repeat the decoder's width at the top
    if root.has("patch_token_len"):
        root.fixed(patch_token_len=vision.num_tokens(vision.crop_size))
    projector_bias = root.take("projector_bias", boolean, False)
    text_fields.done()
    root.done(ROOT_IRRELEVANT)
    return Step37Config(vision=vision, text=text, tokens=tokens, projector_bias=projector_bias)


def _read_vision(fields: JsonFields, folder: Path, beside: Mapping[str, bytes]) -> VisionConfig:
    default = VisionConfig()
    width = fields.first_of(("width", "hidden_size"), integer)
    image_size = fields.take("image_size", integer)
    vision = VisionConfig(
        width=width,
        num_layers=fields.first_of(("layers", "num_hidden_layers"), integer),
        num_heads=fields.first_of(("heads", "num_attention_heads"), integer),
        ffn_hidden_size=_vision_ffn(fields, width),
        image_size=image_size,
        crop_size=_crop_size(folder, beside, image_size),
        patch_size=fields.take("patch_size", integer),
        layer_norm_eps=fields.take("layer_norm_eps", number, default.layer_norm_eps),
        layer_scale_init=fields.first_of(("ls_init_value", "layer_scale_init_value"), number, default.layer_scale_init),
        rope_theta=_vision_theta(fields),
    )
    fields.fixed(
        attention_dropout=(0.0, 0),
        hidden_act="quick_gelu",
        num_channels=3,
        output_dim=vision.output_dim,
        pool_type="none",
        use_abs_posemb=True,
        use_cls_token=False,
        use_ln_post=False,
        use_ln_pre=True,
        use_rope2d=True,
    )
    fields.done(VISION_IRRELEVANT)
    return vision


def _crop_size(folder: Path, beside: Mapping[str, bytes], image_size: int) -> int:
    """`patch_size` of the image processor; what another class of this name means by it is not known."""
    found = VisionConfig().crop_size
    for name in PROCESSOR_FILES:
        if name in beside:
            fields = JsonFields(parse_json_object(beside[name], folder / name), "", folder / name)
            if fields.has("image_processor"):
                fields = fields.section("image_processor")
            if fields.values.get("image_processor_type") == PROCESSOR_TYPE:
                found = fields.take("patch_size", integer, found)
                if fields.has("size"):
                    fields.section("size").fixed(height=image_size, width=image_size)
    return found


def _vision_ffn(fields: JsonFields, width: int) -> int:
    """From `intermediate_size`, or from `mlp_ratio` x width, which is not exact in floating point."""
    if not fields.has("mlp_ratio"):
        fields.read.add("mlp_ratio")
        return fields.take("intermediate_size", integer)
    ratio = fields.take("mlp_ratio", number)
    size = fields.take("intermediate_size", integer, round(width * ratio))
    fields.require(abs(size - width * ratio) < 1, "intermediate_size", f"mlp_ratio x width = {width * ratio:g}", size)
    return size


def _vision_theta(fields: JsonFields) -> float:
    theta = fields.take("rope_theta", number, VisionConfig().rope_theta)
    if fields.has("rope_parameters"):
        rope = fields.section("rope_parameters")
        rope.fixed(rope_type="axial")
        theta = rope.take("rope_theta", number)
        rope.done()
    return theta


def _read_tokens(root: JsonFields, text_fields: JsonFields, beside: Mapping[str, bytes]) -> TokenIds:
    patch = root.take("image_token_id", integer)
    bos = _either(root, text_fields, "bos_token_id", integer, None)
    eos = _either(root, text_fields, "eos_token_id", integers, ())
    return TokenIds(bos=bos, eos=eos, **_image_tokens(root, patch, beside))


def _either(root: JsonFields, text_fields: JsonFields, name: str, convert: Any, default: Any) -> Any:
    """A field of the root or of its text part; both where both have it must agree."""
    outer, inner = root.take(name, convert, None), text_fields.take(name, convert, None)
    if outer is not None and inner is not None:
        root.require(outer == inner, name, f"{inner!r} as {text_fields.prefix}{name}", outer)
    found = inner if outer is None else outer
    return default if found is None else found


def _image_tokens(root: JsonFields, patch: int, beside: Mapping[str, bytes]) -> dict[str, int]:
    explicit = {n: root.take(f"{n}_token_id", integer, None) for n in IMAGE_TOKEN_NAMES}
    published = TokenIds()
    if TOKENIZER_FILE in beside:
        base = _added_tokens(beside[TOKENIZER_FILE], root.file.parent / TOKENIZER_FILE)
        expected = f"{base['im_patch']} (<im_patch> of {TOKENIZER_FILE})"
        root.require(base["im_patch"] == patch, "image_token_id", expected, patch)
    else:
        distance = patch - published.im_patch
        base = {n: getattr(published, n) + distance for n in IMAGE_TOKEN_NAMES}
    ids = {n: base[n] if explicit[n] is None else explicit[n] for n in IMAGE_TOKEN_NAMES}
    root.require(ids["im_patch"] == patch, "im_patch_token_id", f"{patch} as image_token_id", ids["im_patch"])
    return ids


def _added_tokens(content: bytes, file: Path) -> dict[str, int]:
    ids = added_tokens(parse_json_object(content, file), file)
    for name in IMAGE_TOKEN_NAMES:
        if f"<{name}>" not in ids:
            raise ConfigError("added_tokens", f"a token <{name}>", sorted(ids)[:10], file)
    return {name: ids[f"<{name}>"] for name in IMAGE_TOKEN_NAMES}
