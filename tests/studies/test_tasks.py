"""Items of `studies.tasks` are what they say, and a model without skipping goes on as its base does."""

import string

from tiny_runs import skipping

from studies import tasks


def test_items():
    for prompt, answer in tasks.items("copying", 20):
        _, shown, begun = prompt.split("\n")
        assert begun + answer == shown and len(set(shown.split())) == 8
    for prompt, answer in tasks.items("arithmetic", 20):
        assert all(eval(line.replace("=", "==")) for line in f"{prompt}{answer}".split("\n"))
    assert tasks.items("copying", 3) == tasks.items("copying", 3) != tasks.items("copying", 3, seed=1)


def test_agreement(monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", 8)
    hat, texts = skipping("channel"), ["one two", "three"]
    assert (tasks.shared(hat, texts, 1.0) == 1).all() and (tasks.shared(hat, texts, 0.3) < 1).any()


def test_right_is_the_share_of_likeliest_tokens():
    hat = skipping("channel")
    likeliest = {}
    for prompt in string.ascii_letters:
        ids = hat.base.tokenizer(prompt, return_tensors="pt").input_ids
        likeliest[prompt] = hat.base.tokenizer.decode(hat.lm(ids).logits[0, -1].argmax())
    prompt, answer = next((p, a) for p, a in likeliest.items() if len(a) == 1 and a in string.printable)
    other = "a" if answer != "a" else "b"
    assert tasks.right(hat, [(prompt, answer), (prompt, other)]).tolist() == [1, 0]
    assert tasks.right(hat, [(prompt, answer + "\x00")]).tolist()[0] in (0.5, 1)
