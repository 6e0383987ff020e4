"""Read a document once, and ask it many questions.

``prefill`` reads and compresses; ``ask`` answers on a fork of the cache, so the compressed document
stays as it is for the next question.
"""

import cachepress as cp
from cachepress.models import load

DOCUMENT = """Rules of the reading room. The reading room opens at nine and closes at five.
Bags stay in the lockers on the first floor, and a locker costs one euro. Pencils are allowed, and
pens are not. Old maps are shown on Tuesdays only, by Mrs. Lindqvist. Copies cost twenty cents.
The telephone number of the desk is 4821973. Nobody eats in the reading room, but there is a cafe in
the courtyard, which is called The Inkwell. Children under twelve come with an adult.
"""

model, tokenizer = load("smollm2-135m")
# The document opens the user's turn in the model's chat template; ask() ends it with a question.
turn = tokenizer.apply_chat_template([{"role": "user", "content": DOCUMENT}], tokenize=False)
opening = turn[: turn.index(DOCUMENT.strip())]
ids = tokenizer(opening + DOCUMENT, return_tensors="pt", add_special_tokens=False).input_ids

press = cp.KVzipPress(compression_ratio=0.5)
cache = cp.prefill(model, ids, press, tokenizer=tokenizer)
size = cp.size_of(cache)
print(f"{ids.shape[1]} tokens, {size.ratio:.0%} of their key-value pairs removed")

for question in (
    "When does the reading room open?",
    "What is the telephone number of the desk?",
    "What is the cafe called?",
):
    print(question, cp.ask(model, tokenizer, cache, question, max_new_tokens=16))
