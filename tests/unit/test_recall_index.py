"""The index of keys without a model."""

import torch

from plphp.recall.index import build


def test_of_tokens_that_score_alike_the_earlier_comes_first() -> None:
    """Otherwise the tokens that a row reads could depend on the other rows of its batch."""
    drawn = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 3, 8, generator=drawn).repeat_interleave(4, 2)
    index = build(keys, torch.ones(1, 12, dtype=torch.bool), 2)
    alike = index.scores(torch.randn(1, 4, 1, 8, generator=drawn)).view(1, 2, 3, 4)
    assert (alike[..., :-1] > alike[..., 1:]).all()
