"""Tasks of lm-evaluation-harness: scores and work whatever the batch, and its perplexity against our own."""

import json

import numpy as np
import pytest
from tiny_runs import skipping

from hat_lib.config import HatError
from hat_lib.evaluation import lm_eval as harness
from hat_lib.evaluation.lm_eval import load_tasks, run_tasks
from hat_lib.evaluation.perplexity import bits_per_byte, score, text_bytes

pytestmark = pytest.mark.filterwarnings("ignore:token grain")
N = 9

TASK = """
task: {}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: {}
doc_to_text: "{}"
doc_to_target: "{}"
metric_list:
  - {{metric: {}, aggregation: {}, higher_is_better: true}}
"""
CLOZE = TASK.format("cloze", "multiple_choice", "{{text}}", "{{label}}", "acc", "mean")
CLOZE += 'doc_to_choice: "{{choices}}"\n'
ROLLING = TASK.format("rolling", "loglikelihood_rolling", "", "{{text}}", "bits_per_byte", "bits_per_byte")
WRITE = TASK.format("write", "generate_until", "{{text}}", "the", "exact_match", "mean")
WRITE += 'generation_kwargs: {until: ["i", "e"], max_gen_toks: 6}\n'


def texts():
    return [f"Number {n}: the quick brown “fox” {'jumps ' * n}over" for n in range(N)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my tasks")
    choices = [" a dog", " the lazy dogs", "!", " it"]
    rows = [{"text": text, "choices": choices, "label": n % 4} for n, text in enumerate(texts())]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in (("cloze", CLOZE), ("rolling", ROLLING), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module", params=("channel", "token"))
def runs(request, folder):
    """Rows and work by batch size, and the model."""
    pytest.importorskip("lm_eval")
    hat = skipping(request.param)
    return {b: run_tasks(hat, load_tasks(["cloze", "rolling", "write"], folder), batch_size=b) for b in (1, 8)}, hat


@pytest.mark.slow
def test_scores_are_equal_at_any_batch_size(runs):
    (alone, _), (batched, _) = (runs[0][b] for b in (1, 8))
    assert [r.metric for r in alone] == ["acc", "bits_per_byte", "exact_match"]
    for a, b in zip(alone, batched, strict=True):
        assert (a.task, a.metric, a.samples, a.data_hash) == (b.task, b.metric, b.samples, b.data_hash)
        exact = a.metric != "bits_per_byte"
        for name in ("base", "value"):
            found, expected = getattr(b, name), getattr(a, name)
            assert found == expected if exact else found == pytest.approx(expected, abs=1e-4)
    rolling = alone[1]
    assert abs(rolling.value - rolling.base) > 0.01 and rolling.stderr is None and alone[0].stderr > 0
    assert [r.samples for r in alone] == [N, N, N] and len({r.data_hash for r in alone}) == 3


def test_pads_are_not_counted_as_work(runs):
    (_, alone), (_, batched) = (runs[0][b] for b in (1, 8))
    assert np.array_equal(alone.exits, batched.exits) and (alone.exits[1:] > 0).all()
    assert batched.shares == pytest.approx(alone.shares, abs=1e-4)
    assert all(0.05 < share < 0.97 for share in alone.shares)


def test_rolling_likelihood_is_our_perplexity(runs):
    """Of short texts, each from its first token."""
    from lm_eval.api.instance import Instance

    hat = runs[1]
    lm = harness.counting_lm(hat, 4)
    encoded = [[lm.prefix_token_id, *lm.tok_encode(text)] for text in texts()]
    rows = [{"input_ids": ids, "n_context": 0} for ids in encoded]
    ours = score(hat, rows, batch_size=2, progress=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts())]
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert theirs == pytest.approx((-ours.nll).tolist(), abs=1e-3)

    n_bytes = text_bytes(rows, hat.base.tokenizer)
    reported = next(r.value for r in runs[0][1][0] if r.metric == "bits_per_byte")
    assert bits_per_byte(ours.nll.sum(), n_bytes.sum()) == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize(
    "files, name",
    [
        ({"a.yaml": CLOZE}, "hellaswag"),
        ({"a.yaml": CLOZE}, "cloze"),  # without its data
        ({"a.yaml": CLOZE.replace("test_split: test", "test_split: dev"), "rows.jsonl": '{"text": "a"}\n'}, "cloze"),
        ({"a.yaml": CLOZE.replace("dataset_path: json", "dataset_path: owner/name")}, "cloze"),
    ],
)
def test_wrong_tasks_are_named(tmp_path, files, name):
    pytest.importorskip("lm_eval")
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(HatError):
            load_tasks([name], folder)
