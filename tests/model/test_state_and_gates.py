"""TokenState's shares, and an untrained exit gate."""

import pytest
import torch

from hat_lib.model.routers import ExitGate
from hat_lib.model.token_state import TokenState


def test_shares_count_only_what_ran():
    real = torch.tensor([[False, True, True], [True, True, True]])
    state = TokenState(real, real.long().cumsum(1) - 1, torch.zeros_like(real), [0.25, 0.75], n_layers=2)
    state.note(0, 0, None)
    state.note(0, 1, torch.tensor([[True, False]]).repeat(6, 1))
    state.leave(torch.tensor([5]), 1)  # the last token of row 1, after one layer
    state.note(1, 0, torch.tensor([[True, True]] * 5))
    state.note(1, 1, torch.tensor([[True, True]] * 4 + [[False, False]]))
    share = state.share
    torch.testing.assert_close(share[0], torch.where(real, 0.625, 0.0))
    torch.testing.assert_close(share[1], torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.25, 0.0]]))
    assert state.capacity == pytest.approx((5 * 0.625 + 3 + 0.25) / 9)
    assert state.exit_rate == pytest.approx(1 / 5)


def test_cat_joins_decode_steps():
    def step(start, kept):
        one = torch.ones(1, 1, dtype=torch.bool)
        state = TokenState(one, torch.tensor([[start]]), ~one, [1.0], n_layers=1, start=start)
        state.note(0, 0, torch.tensor([[kept, True]]))
        return state

    joined = TokenState.cat([step(0, True), step(1, False)])
    assert joined.tokens == 2 and joined.share.tolist() == [[[1.0, 0.5]]] and joined.capacity == 0.75


def test_a_decode_step_leaves_numbers_and_no_masks():
    """However long a text grows, what its steps leave behind is a number a site."""
    one = torch.ones(1, 1, dtype=torch.bool)
    state = TokenState(one, torch.tensor([[7]]), ~one, [1.0], n_layers=1, start=7)
    state.note(0, 0, torch.rand(1, 4096) > 0.5)
    kept = [v for v in vars(state).values() if isinstance(v, dict)]
    assert sum(getattr(v, "numel", lambda: 1)() for d in kept for v in d.values()) == 1


def test_untrained_gate_scores_zero_and_changes_nothing():
    gate, h = ExitGate(16, rank=2), torch.randn(5, 16)
    assert torch.equal(gate.score(h), torch.zeros(5)) and torch.equal(gate.translate(h), h)
    assert ExitGate(16, rank=0).translate(h).shape == h.shape


def test_gate_reads_the_direction_not_the_scale():
    gate = ExitGate(16, rank=2)
    torch.nn.init.normal_(gate.gate.weight)
    h = torch.randn(5, 16)
    torch.testing.assert_close(gate.score(h), gate.score(1000 * h), rtol=1e-3, atol=1e-3)
    assert gate.translate(h.bfloat16()).dtype == torch.bfloat16
