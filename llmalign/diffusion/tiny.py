"""Pipelines of every supported architecture with random weights, a few thousand parameters each; nothing is downloaded.

They have the parts, configurations and schedulers of the released models and do all that those do, except draw: tests
and dry runs of a recipe need no more. What can draw is trained in `llmalign.diffusion.digits`.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from llmalign import assets
from llmalign.errors import UserError

IMAGE_SIZE, LATENT_SIZE, LATENT_CHANNELS = 8, 4, 4
MAX_LENGTH = 8
TEXT_WIDTH = 16
TEXTS = (
    "a small picture of the digit", "zero one two three four five six seven eight nine",
    "red green blue circle square triangle",
)  # fmt: skip
# What Stable Diffusion 1 and 2 were trained with. `set_alpha_to_one=False` belongs to `steps_offset=1`: the last step
# of a sampler goes from timestep 1 to timestep 0, and both are on the schedule.
STABLE_DIFFUSION_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DDIM = {**STABLE_DIFFUSION_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False}


def word_tokenizer(
    texts: Iterable[str], *, max_length: int = MAX_LENGTH, pad_token: str = "<|endoftext|>"
) -> CLIPTokenizer:
    """A CLIP tokenizer for which every word of `texts` is one token; all else falls apart into bytes.

    As with the released tokenizers there is no unknown token, upper case is read as lower case, and the two last ids
    begin and end a text. `max_length` counts tokens and includes those two.
    """
    blank = CLIPTokenizer().backend_tokenizer
    words = {
        word for text in texts for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(words):
        # A merge that is added last is tried last, so that no word loses the token it has.
        while len(pieces := _merged([*word[:-1], word[-1] + "</w>"], ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            tokens.append(pieces[0] + pieces[1])
    vocabulary = {
        token: index for index, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    }
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=max_length, pad_token=pad_token)


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the pair of the lowest rank is joined until none is left."""
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return pieces
        place = min(pairs)[1]
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]


def t5_tokenizer(texts: Iterable[str], *, max_length: int = 2 * MAX_LENGTH) -> T5Tokenizer:
    """A T5 tokenizer for which every word of `texts` is one token and every other printable ASCII character is one."""
    words = dict.fromkeys("▁" + word for text in texts for word in text.split())
    characters = dict.fromkeys(["▁", *map(chr, range(33, 127))])
    vocabulary = [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(word, -1.0) for word in words] + [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def clip_text_config(tokenizer: CLIPTokenizer, *, width: int = TEXT_WIDTH, layers: int = 2) -> CLIPTextConfig:
    """A text encoder that fits the tokenizer, `width` wide in its hidden states and in its projection."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def _vae(**changes: Any) -> AutoencoderKL:
    """Images of 3x8x8, latents of 4x4x4."""
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        **changes,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    )


def _stable_diffusion(prediction_type: str) -> StableDiffusionPipeline:
    tokenizer = word_tokenizer(TEXTS)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(clip_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=TEXT_WIDTH),
        scheduler=DDIMScheduler(**DDIM, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """The second tokenizer pads with "!", as the released one does."""
    first, second = word_tokenizer(TEXTS), word_tokenizer(TEXTS, pad_token="!")
    unet = _unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT_WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_text_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(second)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION_SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _stable_diffusion_3() -> StableDiffusion3Pipeline:
    first, second, third = word_tokenizer(TEXTS), word_tokenizer(TEXTS, pad_token="!"), t5_tokenizer(TEXTS)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=2 * 8,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_text_config(first)),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(second)),
        tokenizer_2=second,
        text_encoder_3=_t5_encoder(third),
        tokenizer_3=third,
    )


def _flux(guidance: bool) -> FluxPipeline:
    """With `guidance` like FLUX.1-dev, whose network is told the guidance scale, else like FLUX.1-schnell."""
    first, second = word_tokenizer(TEXTS), t5_tokenizer(TEXTS)
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_text_config(first)),
        tokenizer=first,
        text_encoder_2=_t5_encoder(second),
        tokenizer_2=second,
        transformer=transformer,
    )


_BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": lambda: _stable_diffusion("epsilon"),
    "sd2": lambda: _stable_diffusion("v_prediction"),
    "sdxl": _stable_diffusion_xl,
    "sd3": _stable_diffusion_3,
    "flux": lambda: _flux(guidance=True),
    "flux-schnell": lambda: _flux(guidance=False),
}
KINDS = tuple(_BUILDERS)


def build_tiny(kind: str, seed: int = 0) -> DiffusionPipeline:
    """A pipeline with random float32 weights, in evaluation mode: 3x8x8 images, 4x4x4 latents, prompts of 8 tokens.

    `kind` is one of KINDS: `sd` (epsilon), `sd2` (v-prediction), `sdxl`, `sd3`, `flux` (guidance-distilled, like
    FLUX.1-dev) and `flux-schnell`. The same seed gives the same weights and the caller's random state stays as it was.
    Raises UserError for another kind. Flux has no size of its own: call it with `height=8, width=8`.
    """
    if kind not in _BUILDERS:
        raise UserError(f"There is no tiny pipeline of kind {kind!r}; choose one of {', '.join(KINDS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def ensure_tiny_pipeline() -> Path:
    """The folder of `embedded:tiny` for images, the pipeline of kind `sd`, built on first use into the user's cache."""
    key = assets.content_key([Path(__file__)], torch, transformers, diffusers)
    return assets.ensure_folder(f"tiny-pipeline-{key}", _save_tiny, "the tiny pipeline", "a second")


def _save_tiny(folder: Path) -> None:
    pipe = build_tiny("sd")
    # transformers writes on rank 0 alone, and a host with a cache of its own builds on another
    pipe.text_encoder.should_save_on_this_rank = lambda is_main_process: is_main_process
    pipe.save_pretrained(folder)
