"""Press the text decoder of an image-text model.

The vision encoder is left alone. In the decoder, the tokens of the image are key-value pairs like
those of words, and compete with them. The model here is small and random, so that the example runs
anywhere: it shows that the mechanics are right, not that the answers are good.
"""

import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import cachepress as cp

torch.manual_seed(0)
IMAGE, PATCHES = 99, 64  # the token that stands for an image, and how many of them one takes
layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
text = LlamaConfig(vocab_size=100, **layers, **heads)
vision = CLIPVisionConfig(image_size=64, patch_size=8, num_attention_heads=4, **layers)
config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
model = LlavaForConditionalGeneration(config).eval()

words = torch.randint(3, 90, (1, 36))
ids = torch.cat([words[:, :4], torch.full((1, PATCHES), IMAGE), words[:, 4:]], dim=1)
picture = torch.randn(1, 3, 64, 64)

for press in (cp.KeyDiffPress(0.0), cp.KeyDiffPress(0.5)):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        logits = model(ids, pixel_values=picture, past_key_values=cache).logits
    kept = cache.layers[0].lengths[0].tolist()
    print(f"ratio {press.compression_ratio}: {kept} of {ids.shape[1]} pairs a head")
    first = logits[:, -1:].argmax(-1)
    more = model.generate(torch.cat([ids, first], 1), past_key_values=cache, max_new_tokens=5)
    print("  goes on with", more[0, ids.shape[1] :].tolist())
