"""An independent PQEq: numpy, no splitting, no switching, nothing shared with the package.

The periodic energy is the plain reciprocal sum of the true Gaussian densities,

    E = (2π k_e/V) Σ_{k≠0} |Σ_s Q_s exp(−k²/4α_s) exp(i k·x_s)|² / k²  −  the terms inside one atom in one image,

carried to exp(−37); the open energy is the double sum over sites.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

K_E = 14.3996454784255
LAMBDA = 0.462770
KCAL_PER_EV = 23.060547830619


class BruteForce:
    """Energy and gradients at given charges and shells."""

    def __init__(self, positions, cell, chi, eta, z, radius, stiffness, field, limiter, shell_limit=0.25):
        self.r = np.asarray(positions)
        self.cell = cell  # None: open
        self.chi, self.eta, self.z = chi, eta, z
        self.alpha = 0.5 * LAMBDA / radius**2
        self.stiffness = stiffness / KCAL_PER_EV
        self.field = np.asarray(field)
        self.limiter, self.limit = limiter, shell_limit
        self.site_alpha = np.concatenate([self.alpha, self.alpha])

    def _spring(self, shells):
        u = (shells**2).sum(1)
        if self.limiter == "none":
            return (0.5 * self.stiffness * u).sum(), self.stiffness[:, None] * shells
        room = 1 - u / self.limit**2
        return (-0.5 * self.stiffness * self.limit**2 * np.log(room)).sum(), (self.stiffness / room)[:, None] * shells

    def _open(self, x, q):
        n = len(self.r)
        atom = np.concatenate([np.arange(n)] * 2)
        d = x[:, None] - x[None]
        r = np.linalg.norm(d, axis=2)
        a = np.sqrt(self.site_alpha[:, None] * self.site_alpha / (self.site_alpha[:, None] + self.site_alpha))
        same = atom[:, None] == atom
        r[same] = 1.0
        value = np.where(same, 0, erf(a * r) / r)
        slope = np.where(same, 0, 2 * a / math.sqrt(math.pi) * np.exp(-((a * r) ** 2)) / r - erf(a * r) / r**2)
        gradient = ((slope / r)[:, :, None] * d * q[None, :, None]).sum(1)
        return K_E * value @ q, K_E * gradient

    def _periodic(self, x, q):
        k_max = math.sqrt(2 * self.alpha.max() * 37)
        basis = 2 * math.pi * np.linalg.inv(self.cell).T
        reach = [int(np.linalg.norm(v) * k_max / (2 * math.pi)) + 1 for v in self.cell]
        volume = abs(np.linalg.det(self.cell))
        potential, gradient = np.zeros(len(x)), np.zeros((len(x), 3))
        for n0 in range(0, reach[0] + 1):
            grid = np.stack(np.meshgrid([n0], *(np.arange(-m, m + 1) for m in reach[1:]), indexing="ij"), -1).reshape(
                -1, 3
            )
            if n0 == 0:
                grid = grid[(grid != 0).any(1)]
            k = grid @ basis
            k = k[(k**2).sum(1) < k_max**2]
            if not len(k):
                continue
            k2 = (k**2).sum(1)
            phase = np.exp(1j * x @ k.T - k2 / (4 * self.site_alpha[:, None]))
            felt = (2.0 if n0 else 1.0) * 4 * math.pi * K_E / volume / k2 * (q @ phase).conj()
            potential += (phase @ felt).real
            gradient += (phase @ (1j * felt[:, None] * k)).real
        # inside one atom: each site with itself, and the core with its own shell
        n = len(self.r)
        a = np.sqrt(self.alpha / 2)
        own = K_E * 2 * a / math.sqrt(math.pi)
        potential -= np.concatenate([own, own]) * q
        d = x[n:] - x[:n]
        r = np.linalg.norm(d, axis=1)
        safe = np.where(r > 1e-12, r, 1.0)
        value = K_E * np.where(r > 1e-12, erf(a * safe) / safe, 2 * a / math.sqrt(math.pi))
        slope = K_E * (2 * a / math.sqrt(math.pi) * np.exp(-((a * safe) ** 2)) / safe - erf(a * safe) / safe**2)
        pull = np.where(r > 1e-6, slope / safe, 0)[:, None] * d
        potential -= np.concatenate([value * q[n:], value * q[:n]])
        gradient[n:] -= pull * q[:n, None]
        gradient[:n] += pull * q[n:, None]
        return potential, gradient

    def __call__(self, charges, shells, carried=None):
        """(energy, ∂E/∂q [N], ∂E/∂Δ [N, 3], forces on atoms [N, 3]).

        For ``response: all``, or ``shells`` with carried charges.
        """
        n = len(self.r)
        x = np.concatenate([self.r, self.r + shells])
        q = np.concatenate([charges + self.z, -self.z])
        potential, gradient = (self._open if self.cell is None else self._periodic)(x, q)
        spring, pull = self._spring(shells)
        coupled = charges if carried is None else carried
        dipole = coupled @ self.r - self.z @ shells
        energy = self.chi @ charges + 0.5 * self.eta @ charges**2 + spring + 0.5 * q @ potential - self.field @ dipole
        g_q = self.chi + self.eta * charges + potential[:n] - (self.r @ self.field if carried is None else 0)
        g_shell = pull - self.z[:, None] * gradient[n:] + self.z[:, None] * self.field
        forces = -(q[:, None] * gradient).reshape(2, n, 3).sum(0) + coupled[:, None] * self.field
        return energy, g_q, g_shell, forces
