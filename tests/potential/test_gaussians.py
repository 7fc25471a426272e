"""Kernels against high-precision arithmetic and their own derivatives."""

from __future__ import annotations

import mpmath
import pytest
import torch

from voltpi.potential.electrostatics.gaussians import boys, erf_kernel, smooth_switch, switched


@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-3, 0.3, 0.999999, 1.0, 1.7, 12.0, 60.0])
def test_boys_functions(t):
    values = boys(torch.tensor([t], dtype=torch.float64))
    for m, value in enumerate(values):
        exact = mpmath.quad(lambda x, m=m: x ** (2 * m) * mpmath.exp(-t * x * x), [0, 1])
        assert value.item() == pytest.approx(float(exact), rel=2e-14)


def test_kernels_are_derivatives_in_r_squared():
    exponent = torch.tensor(0.37, dtype=torch.float64)
    u = torch.linspace(0.01, 40, 400, dtype=torch.float64, requires_grad=True)
    b0, b1, b2 = erf_kernel(u, exponent)
    (d0,) = torch.autograd.grad(b0.sum(), u, retain_graph=True)
    (d1,) = torch.autograd.grad(b1.sum(), u)
    assert torch.allclose(b1, -2 * d0, rtol=1e-10, atol=1e-13)
    assert torch.allclose(b2, -2 * d1, rtol=1e-10, atol=1e-13)
    r = u.detach().sqrt()
    assert torch.allclose(b0, torch.erf(exponent.sqrt() * r) / r, rtol=1e-13)


def test_switch_is_smooth_and_the_product_rule_holds():
    u = torch.linspace(3.0, 9.0, 601, dtype=torch.float64, requires_grad=True)
    switch = smooth_switch(u, 4.0, 8.0)
    (first,) = torch.autograd.grad(switch[0].sum(), u, retain_graph=True)
    (second,) = torch.autograd.grad(switch[1].sum(), u, retain_graph=True)
    inside = (u > 4.0) & (u < 8.0)
    assert torch.allclose(switch[1], first, atol=1e-12)
    assert torch.allclose(switch[2][inside], second[inside], atol=1e-12)
    assert switch[0][u <= 4.0].eq(1).all()
    assert switch[0][u >= 8.0].eq(0).all()
    b0, b1, b2 = switched(erf_kernel(u, torch.tensor(0.2, dtype=torch.float64)), switch)
    (d0,) = torch.autograd.grad(b0.sum(), u, retain_graph=True)
    (d1,) = torch.autograd.grad(b1.sum(), u)
    assert torch.allclose(b1, -2 * d0, atol=1e-12)
    assert torch.allclose(b2[inside], (-2 * d1)[inside], atol=1e-12)
