"""The Frechet distance against its closed form."""

import pytest
import torch

from vlv.evaluation import fid


def test_distance_of_gaussians_with_known_moments() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=draw, dtype=torch.float64)
    assert fid.distance(a, a) == pytest.approx(0, abs=1e-6)
    assert fid.distance(a + 2.0, a) == pytest.approx(6 * 4.0, rel=1e-6)
    # b = 3 a has covariance 9 C and mean 3 m: |2 m|^2 + tr(C + 9 C - 2 * 3 C) = 4 |m|^2 + 4 tr C
    expected = 4 * a.mean(0).square().sum() + 4 * torch.cov(a.T).trace()
    assert fid.distance(3 * a, a) == pytest.approx(float(expected), rel=1e-6)


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        fid.distance(torch.zeros(1, 4), torch.zeros(5, 4))
