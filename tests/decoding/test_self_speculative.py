"""Lossless decoding: the base's text whatever drafts, the base's distribution when sampled, drafts' K/V overwritten."""

import pytest
import torch
from scipy.stats import chisquare, kstest
from tiny_runs import adaptive, new_hat
from transformers import TextStreamer

from hat_lib.config import HatError
from hat_lib.decoding.generate import WEIGHT_FORMATS
from hat_lib.decoding.inference import AdaptiveInference
from hat_lib.decoding.speculation import Sampler, Speculation, best_draft_length
from hat_lib.engine.decoder import Decoder
from hat_lib.evaluation.choices import Random

N = 24


@pytest.fixture(scope="module", params=["channel", "token"])
def hat(request):
    return adaptive(request.param)


def prompt(seed, length=12):
    return torch.randint(5, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(hat, ids, n=N):
    with hat.dense():
        return hat.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


def speculate(hat, ids, n, draft_length=None, seed=0, **how):
    """The text, and what it took."""
    found = Speculation(hat, seed, draft_length)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0} | how
    return hat.lm.generate(ids, max_new_tokens=n, custom_generate=found, **given), found


@pytest.mark.parametrize(("capacity", "exit_rate"), [(1.0, 0.0), (0.3, 0.0), (0.7, 0.4)])
def test_greedy_is_the_base_token_for_token(hat, capacity, exit_rate):
    for seed, draft_length in ((0, None), (1, None), (0, 3)):
        ids = prompt(seed)
        with hat.at(capacity, exit_rate):
            text, found = speculate(hat, ids, N, draft_length)
        assert torch.equal(text, greedy(hat, ids))
        assert found.new_tokens == found.accepted + found.passes, "each pass adds one token of the base's own"
        assert 0 <= found.accepted <= found.drafted
        if capacity == 1:
            assert found.accepted == found.drafted == found.drafting


def test_what_ran_is_the_prompt_the_drafts_and_their_verification(hat):
    out = AdaptiveInference(hat).generate("One", capacity=0.5, mode="lossless", max_new_tokens=N, measure=False)
    (found,), read = out.speculation, out.ids.shape[1] - 1
    ran = out.prompt_length + found.drafted + found.passes - 1 + found.drafting
    assert out.model_share == pytest.approx(ran / read) and found.drafting < found.drafted


def test_drafts_of_any_quality_change_nothing_and_length_is_exact(hat):
    with hat.using(Random(0.5, seed=3)):
        text, found = speculate(hat, prompt(7), N, draft_length=4)
    assert torch.equal(text, greedy(hat, prompt(7))) and found.accepted < found.drafted
    for n in (1, 2, 3):
        with hat.at(0.5):
            text, found = speculate(hat, prompt(1), n, draft_length=8)
        assert text.shape[1] - 12 == found.new_tokens == n and bool(found.drafts) == (n > 2)


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_drafts_in_fewer_bits_and_the_base_decides(form, monkeypatch):
    hat, ids, formats = new_hat("channel"), prompt(0, 5), set()

    def noted(name):
        original = getattr(Decoder, name)

        def run(self, *args, **given):
            formats.add((name, str(self.weights.qkv.weight.dtype)))
            return original(self, *args, **given)

        return run

    expected = greedy(hat, ids)
    hat.weight_format = form
    for name in ("step", "course"):
        monkeypatch.setattr(Decoder, name, noted(name))
    assert torch.equal(speculate(hat, ids, N)[0], expected)
    draft = {"base": "float32", "int8": "int8", "q4": "uint8"}[form]
    assert formats == {("step", "float32"), ("course", draft)}


def test_stops_at_the_end_of_text_as_generate_does(hat, monkeypatch):
    ids = prompt(2)
    stop = int(greedy(hat, ids)[0, ids.shape[1] + 5])
    monkeypatch.setattr(hat.lm.generation_config, "eos_token_id", stop)
    expected = greedy(hat, ids)
    assert expected.shape[1] < ids.shape[1] + N
    with hat.at(0.7):
        for n in (1, 4, 8):
            assert torch.equal(speculate(hat, ids, N, n)[0], expected)


def test_rejection_rule_gives_the_base_distribution():
    """Leviathan et al. 2022, appendix A.1: whatever drafts."""
    sampler = Sampler(1.0, torch.Generator().manual_seed(0))
    base, draft = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), torch.tensor([0.05, 0.3, 0.05, 0.4, 0.2])
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[sampler.verified([sampler.draw(draft)], [draft], [base, base])[0]] += 1
    assert counts[4] == 0
    assert chisquare(counts[:4].numpy(), (4000 * base[:4]).numpy()).pvalue > 1e-3


@pytest.mark.slow
def test_samples_follow_the_base(hat, monkeypatch):
    """The second new token is a kept draft or its replacement. Its position in the base's cumulative distribution given
    the first token, jittered within the token's own mass, is uniform if it follows the base's distribution."""
    monkeypatch.setattr(hat.lm.generation_config, "eos_token_id", None)
    ids, draws = prompt(4), 300
    with torch.no_grad(), hat.dense():
        every = torch.arange(hat.lm.config.vocab_size)
        after = torch.softmax(hat.lm(torch.cat([ids.expand(len(every), -1), every[:, None]], 1)).logits[:, -1], -1)
    after, order = after.sort(dim=1, descending=True)
    drawn, kept = [], 0
    with hat.at(0.4):
        for seed in range(draws):
            text, found = speculate(hat, ids, 3, seed=seed, do_sample=True)
            drawn.append(text[0, ids.shape[1] :][:2].tolist())
            kept += found.accepted
    assert 0.1 * draws < kept < draws, "drafts were both kept and replaced"
    jitter = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    places = []
    for (one, two), u in zip(drawn, jitter, strict=True):
        rank = int((order[one] == two).nonzero())
        places.append(after[one, :rank].sum() + u * after[one, rank])
    assert kstest(torch.stack(places).numpy(), "uniform").pvalue > 1e-3


def test_seed_and_streamer(hat, capsys):
    with hat.at(0.5):
        texts = [speculate(hat, prompt(5), 20, seed=s, do_sample=True)[0].tolist() for s in (1, 1, 2)]
        text, _ = speculate(hat, prompt(3), N, streamer=TextStreamer(hat.base.tokenizer))
    assert texts[0] == texts[1] != texts[2]
    assert capsys.readouterr().out.strip("\n") == hat.base.tokenizer.decode(text[0]).strip("\n")


def test_draft_length_maximises_tokens_per_work():
    """At c = 0.1, with 1/10 for each further row: a = 0.4 gives 1.4/1.2, then 1.56/1.4; a = 0.8 gives 1.8/1.2,
    2.44/1.4, 2.952/1.6, 3.3616/1.8, 3.6893/2.0, of which the fourth is best."""
    assert best_draft_length(0.4, 0.1) == 1 and best_draft_length(0.8, 0.1) == 4
    assert best_draft_length(0.999, 0.05) == 7 and best_draft_length(0.02, 0.9) == 1


@pytest.mark.parametrize("rows, draft_length", [(2, None), (1, 0)])
def test_bad_input(hat, rows, draft_length):
    with pytest.raises(HatError):
        speculate(hat, torch.ones(rows, 4, dtype=torch.long), 4, draft_length)
