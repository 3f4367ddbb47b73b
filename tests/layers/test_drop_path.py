"""DropPath and LayerScale."""

import pytest
import torch

from dinov2.layers import DropPath, LayerScale


def test_whole_samples_are_dropped_and_the_others_scaled() -> None:
    torch.manual_seed(0)
    y = DropPath(0.2)(torch.ones(1000, 2, 3))
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1.25]))


def test_the_mean_is_kept() -> None:
    torch.manual_seed(0)
    n, rate = 20_000, 0.3
    sigma = (rate / (1 - rate) / n) ** 0.5
    assert abs(DropPath(rate)(torch.ones(n, 1)).mean().item() - 1) < 4 * sigma


def test_nothing_happens_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(50, 3)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"below 1, not {rate}"):
        DropPath(rate)


def test_layer_scale_multiplies_channels() -> None:
    scale = LayerScale(3, 0.5)
    assert scale.gamma.tolist() == [0.5] * 3
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert scale(torch.ones(2, 4, 3))[1, 2].tolist() == [1, 2, 3]


def test_layer_scale_can_overwrite_its_input_and_start_from_a_vector() -> None:
    scale, x = LayerScale(3, torch.tensor([1.0, 2.0, 3.0]), inplace=True), torch.ones(2, 3)
    with torch.no_grad():
        assert scale(x) is x
    assert x.tolist() == [[1.0, 2.0, 3.0]] * 2


def test_no_rate_is_a_rate_of_zero() -> None:
    x = torch.randn(3, 2)
    assert DropPath(None).train()(x) is x
