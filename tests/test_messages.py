"""The pipeline answers questions on messages with pictures."""

import pytest
import torch
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.pictures import IMAGE, llava, made, qwen2_5_vl
from tests.tiny import tokenizer, words

LIMIT = {"max_new_tokens": 5, "min_new_tokens": 5}


class Processor:
    """A processor that puts a model's inputs together as processors do."""

    def __init__(self, inputs) -> None:
        self.inputs, self.tokenizer = inputs, tokenizer()

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        parts = [part for message in messages for part in message["content"]]
        return " ".join("<image>" if p["type"] == "image" else p["text"] for p in parts) + " w7"

    def __call__(self, text, images, return_tensors):
        assert (len(images), return_tensors) == (1, "pt")
        assert images[0] is self.inputs["pixel_values"]
        before, _, after = text[0].partition("<image>")
        ids = [self.tokenizer(x, add_special_tokens=False).input_ids for x in (before, after)]
        whole = self.inputs["input_ids"][0].tolist()
        picture = [x for x in whole if x >= 96]
        ids = torch.tensor([ids[0] + picture + ids[1]])
        kinds = {"mm_token_type_ids": (ids == IMAGE).int()}
        return {**self.inputs, "input_ids": ids, **(kinds if picture[0] != IMAGE else {})}


def asked(inputs):
    image = {"type": "image", "image": inputs["pixel_values"]}
    text = {"type": "text", "text": words(12)}
    return [{"role": "user", "content": [text, image, {"type": "text", "text": words(6, seed=1)}]}]


def answering(make):
    model, inputs = made(make)
    pipe = pipeline(
        "kv-press-text-generation",
        model=model,
        tokenizer=tokenizer(),
        processor=Processor(inputs),
    )
    return model, inputs, pipe


@pytest.mark.parametrize("make", [llava, qwen2_5_vl])
def test_answers_are_those_of_the_model_on_the_whole_prompt(make):
    model, inputs, pipe = answering(make)
    messages, cache = asked(inputs), DynamicCache()
    with_question = [{**messages[0], "content": [*messages[0]["content"]]}]
    with_question[0]["content"].append({"type": "text", "text": words(3, seed=2)})
    text = pipe.processor.apply_chat_template(with_question, True, False)
    whole = pipe.processor([text], [inputs["pixel_values"]], "pt")
    wanted = model.generate(**whole, **LIMIT, do_sample=False)[0, -5:]
    found = pipe(messages, question=words(3, seed=2), press=cp.KnormPress(0.0), **LIMIT)
    assert found == {"answer": pipe.tokenizer.decode(wanted, skip_special_tokens=True)}
    options = {"press": cp.KnormPress(0.5), "cache": cache, "return_stats": True}
    found = pipe([messages], questions=[words(3, seed=2), words(2)], **options, **LIMIT)
    (one,) = found
    n = whole["input_ids"].shape[1] - 4
    assert one["stats"].context_tokens == n
    assert len(one["answers"]) == 2
    assert {int(x) for layer in compressed_layers(cache) for x in layer.lengths.flatten()} == {
        n // 2
    }


def test_what_does_not_work_with_messages_is_refused_in_one_line():
    model, inputs, pipe = answering(llava)
    messages = asked(inputs)
    plain = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer())
    with pytest.raises(cp.CachepressError, match="got messages and no processor"):
        plain(messages, question=words(3))
    with pytest.raises(cp.CachepressError, match="prefill_chunk_size: got 4"):
        pipe(messages, question=words(3), press=cp.KnormPress(0.5), prefill_chunk_size=4)
    with pytest.raises(cp.CachepressError, match="observes the question"):
        pipe(messages, question=words(3), press=cp.FinchPress(0.5))
    with pytest.raises(cp.CachepressError, match="got a last one of 'assistant', wanted user"):
        pipe([*messages, {"role": "assistant", "content": "w1"}], question=words(3))
    by_url = [{"role": "user", "content": [{"type": "image", "url": "picture.png"}]}]
    with pytest.raises(cp.CachepressError, match="wanted the picture itself under 'image'"):
        pipe(by_url, question=words(3))
    with pytest.raises(cp.CachepressError, match="wanted an empty one for messages"):
        cache = cp.prefill(model, torch.tensor([[5, 6, 7]]), cp.KnormPress(0.5))
        pipe(messages, question=words(3), press=cp.KnormPress(0.5), cache=cache)
