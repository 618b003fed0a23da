"""The pocket base: a LLaVA of under 3 M weights (CLIP tower, two-layer projector, Llama) and its tokenizer.

`resolve` finds the committed weights; `new_model` and `new_processor` make the untrained ones that
`workloads.training.pretrain` trains.
"""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from workloads.config import UserError

# The class is named, since the automatic choice depends on whether torchvision is installed.
IMAGE_PROCESSOR = "CLIPImageProcessorPil"
IMAGE_SIZE = 96
PATCH_SIZE = 12
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>", "<unk>")
# One user turn with the image first, then the answer, as LLaVA-1.5 orders them.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_BASE = Path(__file__).parent.parent / "assets" / "base"


def resolve(name_or_path: str) -> Path:
    """The folder of a base model: the packaged one for `pocket`, else a local folder."""
    folder = _BASE if name_or_path == "pocket" else Path(name_or_path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path: {name_or_path!r} is not allowed; 'pocket' or a model folder")
    return folder


def new_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: `words` are whole tokens, all other text is spelled in single characters.

    Transcriptions (capitals) and numbers (digits) are therefore spelled, and unseen ones cost nothing new.
    """
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    vocabulary = list(dict.fromkeys([*pieces, *sorted(words)]))
    ids = {token: i for i, token in enumerate(vocabulary)}
    # Words of any length are spelled; by default those over 100 characters become unknown.
    model = models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=10**6)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        clean_up_tokenization_spaces=False,
    )


def new_processor(words: list[str]) -> LlavaProcessor:
    """Tokenizer and image processor as one; images are 96 px and are only rescaled and normalised."""
    image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=new_tokenizer(words),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The untrained pocket model; weights follow from `seed`."""
    import torch

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)
