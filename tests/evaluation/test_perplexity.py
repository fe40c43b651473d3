"""Perplexity against sums worked out by hand; work, agreement and bytes likewise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import GRAINS, skipping
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hat_lib.config import HatError
from hat_lib.evaluation.perplexity import Score, bits_per_byte, by_document, score, score_each, text_bytes
from hat_lib.method.cost import state_cost
from hat_lib.text.blocks import load_text

SHARES = ("capacity", "exit_rate", "model_share")


@pytest.fixture(scope="module")
def blocks(tiny_base, tmp_path_factory):
    """Strided windows of one document, the last one shorter, and short documents without context."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "long.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    (folder / "many.jsonl").write_text("".join(f'{{"text": "{n} and {"x" * n}"}}\n' for n in range(3, 23)))
    long = load_text(folder / "long.txt", tiny_base.tokenizer, split="train", block_size=64, stride=40)
    many = load_text(folder / "many.jsonl", tiny_base.tokenizer, split="train", block_size=16)
    rows = [*long, *many]
    assert len({len(r["input_ids"]) for r in rows}) > 5 and {r["n_context"] for r in rows} >= {0, 24}
    return rows


@pytest.fixture(scope="module")
def base_score(tiny_base, blocks):
    return score(tiny_base.model, blocks, progress=False)


@pytest.fixture(scope="module", params=GRAINS)
def hat(request):
    return skipping(request.param)


def test_score_is_the_sum_over_windows_by_hand(tiny_base, blocks, base_score):
    total, count = 0.0, 0
    for number, row in enumerate(blocks):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = tiny_base.model(ids).logits[0].double().log_softmax(-1)
        new = range(max(row["n_context"], 1), len(row["input_ids"]))
        nll = -sum(float(log_p[t - 1, row["input_ids"][t]]) for t in new)
        assert base_score.nll[number] == pytest.approx(nll, rel=1e-5)
        assert base_score.tokens[number] == len(new)
        total, count = total + nll, count + len(new)
    assert base_score.perplexity == pytest.approx(np.exp(total / count), rel=1e-5)


def test_batch_size_changes_nothing(hat, blocks, base_score):
    alone, batched = (score(hat, blocks, batch_size=b, progress=False) for b in (1, 4))
    assert np.allclose(batched.nll, alone.nll, rtol=1e-4)
    assert not np.allclose(alone.nll, base_score.nll, rtol=1e-2)
    for name in SHARES:
        assert getattr(batched, name) == pytest.approx(getattr(alone, name), abs=1e-4)
        assert 0.05 < getattr(alone, name) < 0.97


def test_work_is_that_of_all_tokens(hat, blocks):
    """Capacity, exit rate and model share are ratios of sums, not means over blocks of unequal length."""
    found = score(hat, blocks, progress=False)
    shares = ran = left = n = executed = dense = 0.0
    for row in blocks:
        with torch.no_grad():
            hat.lm(torch.tensor([row["input_ids"]]), use_cache=False)
        state, cost = hat.trace, state_cost(hat, hat.trace)
        shares, ran = shares + float(state.share.sum()), ran + float(state.exit_layer.sum())
        left, n = left + float((state.exit_layer < 4).sum()), n + state.exit_layer.numel()
        executed, dense = executed + float(cost.executed.sum()), dense + float(cost.dense.sum())
    expected = shares / ran, left / n, executed / dense
    assert [getattr(found, name) for name in SHARES] == pytest.approx(expected, rel=1e-4)
    assert found.exits.sum() == n and found.depth == pytest.approx(ran / n)


def test_score_each_is_both_scores_and_their_agreement_from_two_passes(hat, blocks, base_score):
    with hat.collect() as traces:
        base, (adaptive, same) = score_each(hat, blocks, [hat.at, hat.dense], batch_size=3, progress=False)
    assert len(traces) == 3 * -(-len(blocks) // 3)
    alone = score(hat, blocks, batch_size=3, progress=False)
    for name, value in vars(alone).items():
        assert name in ("top1", "kl") or np.array_equal(getattr(adaptive, name), value), name
    assert np.allclose(base.nll, base_score.nll, rtol=1e-4) and base.kl is None
    assert [getattr(base, name) for name in SHARES] == [1.0, 0.0, 1.0] == [getattr(same, name) for name in SHARES]
    assert np.array_equal(same.nll, base.nll) and same.top1 == 1.0 and abs(same.kl) < 1e-6


def test_agreement_by_hand(hat, blocks):
    rows, same, divergence = blocks[:3], [], []
    for row in rows:
        ids, new = torch.tensor([row["input_ids"]]), slice(max(row["n_context"], 1) - 1, -1)
        with torch.no_grad():
            q = hat.lm(ids).logits[0, new].double()
            with hat.dense():
                p = hat.lm(ids).logits[0, new].double()
        same.append(p.argmax(-1) == q.argmax(-1))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergence.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    _, (found,) = score_each(hat, rows, batch_size=2, progress=False)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean())) and 0.02 < found.top1 < 0.98
    assert found.kl == pytest.approx(float(torch.cat(divergence).mean()), rel=1e-3) and found.kl > 0.01


def test_refusals(hat, tiny_base, blocks):
    for model, rows, batch_size in (
        (hat.lm, blocks, 1),
        (tiny_base.model, [], 1),
        (tiny_base.model, [{"input_ids": [5, 6], "n_context": 2}], 1),
        (tiny_base.model, blocks, 0),
    ):
        with pytest.raises(HatError):
            score(model, rows, batch_size=batch_size, progress=False)
    with pytest.raises(HatError):
        score_each(tiny_base.model, blocks, progress=False)


def llama_like_tokenizer():
    """Starts a text with BOS, puts a space before it, and removes that when decoding."""
    words = ["<s>", "\u2581The", "\u2581fox", "\u2581is", "\u2581\u00e9trange"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


class TestBytes:
    def test_by_hand(self, tiny_base):
        """One token per byte: a character split by a block's edge counts where it ends."""
        ids = tiny_base.tokenizer("a\u00e9\u20acb").input_ids  # 1 + 2 + 3 + 1 bytes
        rows = [(ids, 0, 6), (ids[:5], 0, 2), (ids[2:], 2, 4), (ids[2:6], 2, 3), (ids[:2], 0, 0)]
        rows.append((tiny_base.tokenizer("ab</s>").input_ids, 0, 1))  # a special token is no text
        dataset = [{"input_ids": part, "n_context": context} for part, context, _ in rows]
        assert text_bytes(dataset, tiny_base.tokenizer).tolist() == [n for _, _, n in rows]

    def test_no_space_before_a_text_and_none_lost_within(self):
        tokenizer = llama_like_tokenizer()
        ids = tokenizer("The fox is \u00e9trange").input_ids
        rows = [{"input_ids": part, "n_context": n} for part, n in ((ids, 0), (ids[1:], 0), (ids[2:], 1), (ids[:2], 0))]
        assert text_bytes(rows, tokenizer).tolist() == [19, 16, 12, 3]


def test_documents_by_hand():
    dataset = [{"input_ids": [1] * n, "doc": doc, "n_context": 0} for n, doc in ((5, "b"), (3, "a"), (9, "b"))]
    tokens, n_bytes = np.array([4, 2, 8]), np.array([8, 0, 16])
    base = Score(np.array([4.0, 2.0, 8.0]), tokens)
    table = by_document(dataset, n_bytes, base, Score(np.array([6.0, 1.0, 12.0]), tokens))
    first, second = table.itertuples()
    assert (first.document, first.blocks, first.tokens, first.bytes) == ("b", 2, 12, 24)
    assert (first.base_perplexity, first.perplexity) == (pytest.approx(np.e), pytest.approx(np.exp(1.5)))
    assert first.increase == pytest.approx(np.exp(0.5) - 1)
    assert first.base_bits_per_byte == pytest.approx(0.5 / np.log(2)) == pytest.approx(first.bits_per_byte / 1.5)
    assert (second.document, second.blocks, second.tokens, second.bytes) == ("a", 1, 2, 0)
    assert second.bits_per_byte is None and bits_per_byte(np.log(2) * 12, 4) == pytest.approx(3)
