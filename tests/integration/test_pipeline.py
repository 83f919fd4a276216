"""transformers' pipeline("image-text-to-text") on an attached model."""

import pytest
import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    pipeline,
)

import plphp
from plphp.demo.model import WEIGHTS, load

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random LLaVA with the tokenizer of the embedded model and a PIL image processor."""
    from transformers import AutoTokenizer
    from transformers.models.siglip import image_processing_pil_siglip

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=24, patch_size=4, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            vision_feature_select_strategy="full",
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    ).eval()
    processor = LlavaProcessor(
        image_processor=image_processing_pil_siglip.SiglipImageProcessorPil(
            size={"height": 24, "width": 24}
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return model, processor


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_prunes_what_it_generates() -> None:
    model, processor = llava()
    picture = Image.effect_noise((30, 30), 80).convert("RGB")
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "describe picture 1."},
            ],
        }
    ]
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = answer(text=chat, generate_kwargs=options)
    with plphp.prune(model, plphp.PLPHP(r=1, delta_r=0)):
        assert answer(text=chat, generate_kwargs=options) == wanted
    with plphp.prune(model, plphp.PLPHP(r=0.25, delta_r=0)) as pruning:
        answer(text=chat, generate_kwargs=options)
    assert pruning.report.images == (1,)
    assert pruning.report.retention == 0.25


def test_the_embedded_model_in_a_batch_is_what_it_is_alone() -> None:
    embedded = load()
    pictures = [Image.new("RGB", (112, 112), colour) for colour in ("white", "gray")]
    prompts = [(pictures[:1], "describe picture 1."), (pictures, "describe picture 2."), ([], "hi")]
    with plphp.prune(embedded.model) as pruning:
        batch = embedded.batch(prompts)
        out = embedded.model.generate(**batch, max_new_tokens=8)
        assert pruning.report.images == (1, 2, 0)
        for row, (images, question) in enumerate(prompts):
            alone = embedded.inputs(images, question)
            got = embedded.model.generate(**alone, max_new_tokens=8)
            text = embedded.decode(got[0, alone["input_ids"].shape[1] :])
            assert text == embedded.decode(out[row, batch["input_ids"].shape[1] :])
