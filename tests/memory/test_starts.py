"""What layers start from when nothing is said: heads, the base of the angles, keys that look one token back."""

import pytest
import torch

from titans.layers.attention import Attention
from titans.layers.convolution import ShortConvolution, start_keys_one_token_behind
from titans.layers.gates import default_heads


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (64, 1), (100, 1), (128, 2), (192, 3), (200, 2), (384, 6)])
def test_heads_are_at_least_64_wide_unless_told(width, heads):
    assert default_heads(width) == heads


def test_angles_have_the_base_10_000_unless_told():
    assert Attention(12, 2, window=4).rope_base == 10_000


def test_keys_start_as_the_queries_of_the_token_before_and_a_fifth_of_their_own():
    torch.manual_seed(0)
    queries, keys, conv = torch.randn(6, 6), torch.randn(6, 6), ShortConvolution(18, 3)
    conv.weight.data.normal_()
    old = conv.weight.detach().clone()
    assert start_keys_one_token_behind(queries, keys, conv)
    of_queries, of_keys, of_values = conv.weight.detach().chunk(3, -1)
    assert torch.equal(keys, queries)
    assert torch.equal(of_values, old[:, 12:]) and not of_queries[0].any()
    assert torch.equal(of_queries[1:], old[1:, :6]), "taps of queries stay, but for the furthest"
    assert torch.equal(of_keys[:2], of_queries[1:]), "a key has its query's taps, one token further back"
    assert torch.equal(of_keys[2], of_queries[2] * 0.2)


def test_without_two_taps_nothing_looks_back():
    keys = torch.ones(6, 6)
    assert not start_keys_one_token_behind(torch.zeros(6, 6), keys, None)
    assert not start_keys_one_token_behind(torch.zeros(6, 6), keys, ShortConvolution(18, 1)) and keys.all()
