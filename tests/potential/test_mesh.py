"""The mesh by itself: its window, both ways of carrying charges to it and back, its kernels, and tabulated pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import iv

from voltpi.potential.electrostatics import ewald, kernel_cache
from voltpi.potential.electrostatics.ewald import CoulombOperator
from voltpi.potential.electrostatics.kernel_cache import KernelCache
from voltpi.potential.electrostatics.mesh import CompiledSites, Mesh, MeshBox, TorchSites
from voltpi.potential.electrostatics.pairs import Pairs, PairState
from voltpi.potential.electrostatics.splitting import Splitting
from voltpi.potential.electrostatics.window import Resolution, Window, resolutions
from voltpi.potential.systems import Systems

from brute_force import K_E
from structures import rattled_salt, water_box

WINDOWS = sorted({r[:2] for accuracy in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12) for r in resolutions(accuracy)})
DTYPES = [torch.float64, torch.float32]
SHAPES = [(12, 15, 20), (32, 9, 25), (5, 4, 6)]  # the last one smaller than a window
SUPPORTS = [Resolution(4, 2.4, 0.5), Resolution(8, 2.4, 0.3333), Resolution(10, 2.2, 0.3), Resolution(16, 2.0, 0.3)]


# -- the window ------------------------------------------------------------------------------------------------------


def kaiser_bessel(t, support, b):
    """φ, φ' and φ'' of s² I₂(b s)/I₂(b), s² = 1 − (2t/w)², from d(x² I₂)/dx = x² I₁ and d(x I₁)/dx = x I₀."""
    s = np.sqrt(np.maximum(1 - (2 * t / support) ** 2, 0))
    slope = -4 * b / (support**2 * iv(2, b))
    first = slope * t * s * iv(1, b * s)
    second = slope * (s * iv(1, b * s) - 4 * b * t**2 / support**2 * iv(0, b * s))
    return s**2 * iv(2, b * s) / iv(2, b), first, second


def on_the_mesh(window, fraction):
    """Value and derivatives [f, support] of the polynomials at fractions of a mesh interval, and where that is."""
    powers = np.arange(len(window.coefficients))
    x = np.subtract(fraction, 0.5)[:, None]
    out = []
    for k in range(3):
        factors = np.array([math.perm(p, k) for p in powers], dtype=float)
        out.append((factors * x ** np.maximum(powers - k, 0)) @ window.coefficients)
    t = np.asarray(fraction)[:, None] - np.arange(window.support) + window.support / 2 - 1
    return out, t


@pytest.mark.parametrize(("support", "shape"), WINDOWS)
def test_the_window_is_the_kaiser_bessel_function(support, shape):
    window = Window(support, shape)
    found, t = on_the_mesh(window, np.linspace(0, 1, 41))
    for k, (values, expected) in enumerate(zip(found, kaiser_bessel(t, support, shape * support), strict=True)):
        # of fifteen digits a derivative of fourteenth powers loses two
        assert np.abs(values - expected).max() < (1e-13, 1e-11, 1e-9)[k]
    assert window.value(t) == pytest.approx(kaiser_bessel(t, support, shape * support)[0], abs=1e-14)


@pytest.mark.parametrize(("support", "shape"), WINDOWS)
def test_the_window_is_continuous_over_knots_and_ends_flat(support, shape):
    """A site that moves from one mesh interval to the next is carried by the same function: no kick at a mesh point."""
    found, _ = on_the_mesh(Window(support, shape), [0.0, 1.0])
    for (start, end), tolerance in zip(found, (1e-13, 2e-11, 2e-9), strict=True):
        assert np.abs(end[1:] - start[:-1]).max() < tolerance
    for values in found[:2]:  # the second derivative may jump there
        assert abs(values[1, 0]) < 1e-11
        assert abs(values[0, -1]) < 1e-11


@pytest.mark.parametrize(("support", "shape"), WINDOWS[:: len(WINDOWS) // 4])
def test_fourier_transform_of_the_window(support, shape):
    window = Window(support, shape)
    theta = np.array([0.0, 0.07, 0.31, 0.5, 0.93, 1.5, 2.4, 6.5])
    expected = [
        2 * quad(lambda t: kaiser_bessel(t, support, shape * support)[0], 0, support / 2, weight="cos",
                 wvar=2 * math.pi * k, epsabs=1e-13, limit=200)[0]
        for k in theta
    ]  # fmt: skip
    assert window.transform(theta) == pytest.approx(expected, abs=2e-12)


def test_deconvolution_undoes_spreading_and_gathering():
    """φ̂²/(Σ_m φ̂(θ + m)²)², with aliases enough; and a long wave comes back as it was."""
    window, n = Window(8, 2.4), 18
    theta = np.fft.fftfreq(n)
    aliases = window.transform(theta[:, None] + np.arange(-8, 9))
    expected = window.transform(theta) ** 2 / (aliases**2).sum(1) ** 2
    assert window.deconvolution(n) == pytest.approx(expected, rel=1e-6)
    mesh = np.arange(n)
    weights = window.value((mesh - 7.3 + n / 2) % n - n / 2)
    structure = np.fft.fft(weights)[1] * np.exp(2j * math.pi * 7.3 / n)
    assert abs(structure) ** 2 * window.deconvolution(n)[1] == pytest.approx(1.0, abs=1e-7)


# -- sites: two implementations of one thing -------------------------------------------------------------------------


def sites_of(kind, points, shape, window, dtype, meshes=3):
    mesh = torch.arange(len(points)) % meshes
    return kind(points, mesh, shape, window, dtype)


def scattered(shape, count=60, seed=0):
    """Mesh coordinates [s, 3] in and around the cell, with sites on its faces and on mesh points."""
    n = torch.tensor(shape, dtype=torch.float64)
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = (3 * points - 1) * n
    points[0], points[1], points[2], points[3] = 0, n, -1e-17, n - 1e-14
    points[4], points[5] = torch.tensor([0.5, 1.0, 2.0]), 7 * n + 0.25
    return points


def random_grid(shape, dtype, meshes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(meshes, *shape, generator=generator, dtype=torch.float64).to(dtype)


def carried(sites, shape, dtype):
    """What every method of ``sites`` answers."""
    generator = torch.Generator().manual_seed(2)
    count = len(sites.points)
    charges = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    dipoles = torch.randn(count, 3, generator=generator, dtype=torch.float64).to(dtype)
    out = {}
    for name, values in (("spread", charges), ("spread_dipoles", dipoles)):
        grid = torch.zeros(3, *shape, dtype=dtype)
        getattr(sites, name)(values, grid)
        out[name] = grid
    grid = random_grid(shape, dtype)
    for name in ("gather", "gather_gradient", "gather_curvature"):
        out[name] = getattr(sites, name)(grid)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", SUPPORTS, ids=lambda w: f"{w.support} points")
@pytest.mark.parametrize("shape", SHAPES)
def test_sites_of_any_device_equal_the_compiled_ones(shape, window, dtype):
    points = scattered(shape)
    one, two = (carried(sites_of(k, points, shape, window, dtype), shape, dtype) for k in (CompiledSites, TorchSites))
    for name, expected in one.items():
        scale = max(1.0, float(expected.abs().max()))
        assert two[name].shape == expected.shape
        assert two[name].dtype == expected.dtype
        limit = 1e-13 if dtype == torch.float64 else 5e-6
        assert float((two[name] - expected).abs().max()) < limit * scale, name


@pytest.mark.parametrize("kind", [CompiledSites, TorchSites])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_is_close_to_double(kind, shape):
    points, window = scattered(shape), SUPPORTS[1]
    one, two = (carried(sites_of(kind, points, shape, window, d), shape, d) for d in DTYPES)
    for name, expected in one.items():
        assert float((two[name] - expected).abs().max()) < 1e-5 * float(expected.abs().max()), name


@pytest.mark.parametrize("kind", [CompiledSites, TorchSites])
@pytest.mark.parametrize("window", SUPPORTS, ids=lambda w: f"{w.support} points")
@pytest.mark.parametrize("shape", SHAPES)
def test_gathering_is_the_adjoint_of_spreading(kind, window, shape):
    points = scattered(shape)
    sites = sites_of(kind, points, shape, window, torch.float64)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(points), 4, generator=generator, dtype=torch.float64)
    field, grid = random_grid(shape, torch.float64), torch.zeros(3, *shape, dtype=torch.float64)
    sites.spread(q[:, 0].contiguous(), grid)
    sites.spread_dipoles(q[:, 1:], grid)  # added to what is there
    answer = (sites.gather_gradient(field) * q).sum()
    assert float((grid * field).sum()) == pytest.approx(float(answer), abs=1e-11)
    assert float((sites.gather(field) - sites.gather_gradient(field)[:, 0]).abs().max()) < 1e-13


def test_sites_touch_their_own_mesh_and_the_right_points():
    """A charge spread by hand: the window's values around it on every axis, periodic, on its own mesh and no other."""
    shape, window = (12, 15, 20), Resolution(8, 2.4, 0.3333)
    at = torch.tensor([[0.3, 14.8, 9.5]], dtype=torch.float64)
    axes = []
    for x, n in zip(at[0].tolist(), shape, strict=True):
        images = (np.arange(n) - x)[:, None] + n * np.arange(-2, 3)
        axes.append(kaiser_bessel(np.where(abs(images) < 4, images, 4.0), 8, 2.4 * 8)[0].sum(1))
    expected = np.einsum("i,j,k->ijk", *axes)
    for kind in (CompiledSites, TorchSites):
        grid = torch.zeros(3, *shape, dtype=torch.float64)
        kind(at, torch.tensor([1]), shape, window, torch.float64).spread(torch.tensor([1.0]).double(), grid)
        assert grid[1].numpy() == pytest.approx(expected, abs=1e-13)
        assert not grid[[0, 2]].any()


@pytest.mark.parametrize("kind", [CompiledSites, TorchSites])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_and_curvature_are_derivatives(kind, shape):
    """Fourth-order central differences; the window's third derivative jumps at its ends, where φ'' does."""
    points, window = scattered(shape), Resolution(12, 2.3, 0.3)
    field = random_grid(shape, torch.float64)

    def difference(method, axis, h=1e-3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[axis] = h

        def at(k):
            return getattr(sites_of(kind, points + k * shift, shape, window, torch.float64), method)(field)

        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)

    middle = sites_of(kind, points, shape, window, torch.float64)
    gradient, curvature = middle.gather_gradient(field), middle.gather_curvature(field)
    assert float((gradient[:, 0] - middle.gather(field)).abs().max()) < 1e-13
    columns = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 1): 3, (1, 2): 4, (2, 2): 5}
    for axis in range(3):
        error = difference("gather", axis) - gradient[:, 1 + axis]
        assert float(error.abs().max()) < 1e-9
        slopes = difference("gather_gradient", axis)[:, 1:]
        for other in range(3):
            column = columns[min(axis, other), max(axis, other)]
            assert float((slopes[:, other] - curvature[:, column]).abs().max()) < 1e-6


@pytest.fixture
def two_threads():
    """Torch on two threads: the compiled loops share their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 18, 20), (27, 12, 15), (9, 30, 30)], ids=["four layers", "two", "none"])
def test_several_threads_give_the_same(shape, dtype):
    window = Resolution(10, 2.2, 0.3)
    points = scattered(shape, count=3500)
    shared = sites_of(CompiledSites, points, shape, window, dtype)
    layers = min(2, shape[0] // 20)
    assert [len(c) for c in shared.colours] == ([layers, layers] if layers else [1])
    assert len(shared.parts) == 2
    answers = carried(shared, shape, dtype)
    torch.set_num_threads(1)
    alone = carried(sites_of(CompiledSites, points, shape, window, dtype), shape, dtype)
    reference = carried(sites_of(TorchSites, points, shape, window, dtype), shape, dtype)
    for name, expected in alone.items():
        scale = max(1.0, float(expected.abs().max()))
        limit = 1e-13 if dtype == torch.float64 else 1e-5
        assert float((answers[name] - expected).abs().max()) < limit * scale, name
        assert float((answers[name] - reference[name]).abs().max()) < limit * scale, name


# -- kernels ---------------------------------------------------------------------------------------------------------

CELL = torch.tensor([[7.0, 0.3, 0.0], [-1.0, 8.0, 0.4], [0.2, 0.5, 9.0]], dtype=torch.float64)
NORMAL = torch.linalg.cross(CELL[0], CELL[1])
BOXES = {
    "periodic": MeshBox(CELL, torch.zeros(3, dtype=torch.float64), (15, 16, 18), "periodic", 0.0),
    "slab": MeshBox(
        torch.stack([CELL[0], CELL[1], 20 * NORMAL / NORMAL.norm()]),
        torch.zeros(3, dtype=torch.float64), (15, 16, 36), "slab", 10.0,
    ),
    "open": MeshBox(
        torch.diag(torch.tensor([18.0, 20.0, 22.0], dtype=torch.float64)),
        torch.zeros(3, dtype=torch.float64), (32, 36, 40), "open", 10.0,
    ),
}  # fmt: skip
INVERSE = torch.tensor([0.8, 1.7, 5.0], dtype=torch.float64)
NO_SPLIT = torch.zeros(3, 3, dtype=torch.bool)
SPLIT = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


def mesh_of(boundary, split, beta=0.55, dtype=torch.float64):
    return Mesh(BOXES[boundary], INVERSE, split, beta, K_E, Resolution(10, 2.2, 0.3), dtype)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is not on the CPU: what follows is computed as on other devices."""

    @property
    def device(self):
        return torch.device("meta")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [NO_SPLIT, SPLIT], ids=["no pairs", "pairs"])
@pytest.mark.parametrize("boundary", BOXES)
def test_kernels_of_any_device_equal_the_compiled_ones(boundary, split, dtype, threads, two_threads):
    torch.set_num_threads(threads)
    mesh = mesh_of(boundary, split, dtype=dtype)
    grid = random_grid(BOXES[boundary].shape, dtype, meshes=24)
    structure = mesh.transform(grid)
    assert structure.shape == (8, 3, mesh.waves)
    assert structure.numel() > 50_000  # enough for two threads
    compiled, other = mesh.felt(structure), mesh.felt(structure.as_subclass(Elsewhere))
    assert type(other) is Elsewhere
    limit = 1e-14 if dtype == torch.float64 else 1e-6
    assert float((compiled - other.as_subclass(torch.Tensor)).abs().max()) < limit * float(compiled.abs().max())


@pytest.mark.parametrize("split", [NO_SPLIT, SPLIT], ids=["no pairs", "pairs"])
@pytest.mark.parametrize("boundary", BOXES)
def test_kernels_are_those_of_the_formula(boundary, split):
    """Two channels at a time: the potential of a wave is K_ab(k) times it, with K_ab as written in the module."""
    beta = 0.55
    mesh, box = mesh_of(boundary, split, beta), BOXES[boundary]
    volume, shape = abs(np.linalg.det(box.cell.numpy())), np.array(box.shape)
    reciprocal = 2 * math.pi * np.linalg.inv(box.cell.numpy()).T
    window = Window(10, 2.2)
    factors = [window.deconvolution(n) for n in box.shape]
    matrix = np.zeros((3, 3, mesh.waves))
    for b in range(3):
        one = torch.zeros(1, 3, mesh.waves, dtype=torch.complex128)
        one[0, b] = 1
        matrix[:, b] = mesh.felt(one)[0].real.numpy()
    for wave in ((0, 0, 0), (1, 0, 0), (-2, 3, 1), (0, 0, 3), (4, -5, 7)):
        k = np.array(wave) @ reciprocal
        k2 = k @ k
        if boundary == "periodic":
            long = 0.0 if wave == (0, 0, 0) else 1 / k2
        elif boundary == "open":
            long = 50.0 if wave == (0, 0, 0) else (1 - math.cos(10.0 * math.sqrt(k2))) / k2
        else:
            in_plane = np.linalg.norm(np.array([*wave[:2], 0]) @ reciprocal)
            long = -50.0 if wave == (0, 0, 0) else (1 - (-1) ** wave[2] * math.exp(-10.0 * in_plane)) / k2
        at = int(np.ravel_multi_index(np.mod(wave, shape), (*shape[:2], shape[2] // 2 + 1)))
        spread = math.prod(f[m] for f, m in zip(factors, wave, strict=True)) * math.prod(box.shape)
        for a in range(3):
            for b in range(3):
                width = float(INVERSE[a] + INVERSE[b])
                if split[a, b]:
                    width = max(width, 1 / beta**2)
                expected = 4 * math.pi * K_E / volume * long * math.exp(-0.25 * k2 * width) * spread
                assert matrix[a, b, at] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("split", [NO_SPLIT, SPLIT], ids=["no pairs", "pairs"])
@pytest.mark.parametrize("boundary", BOXES)
def test_strain_is_the_derivative_of_the_mesh_energy(boundary, split):
    """At fixed mesh coordinates; the box of a cluster keeps its radius R, that of a slab is stretched."""
    box = BOXES[boundary]
    grid = random_grid(box.shape, torch.float64, meshes=6)

    def energy(strain):
        turned = box.cell @ (torch.eye(3, dtype=torch.float64) + strain)
        reach = 0.5 * float(turned[2].norm()) if boundary == "slab" else box.reach
        mesh = Mesh(
            box._replace(cell=turned, reach=reach), INVERSE, split, 0.55, K_E, Resolution(10, 2.2, 0.3), torch.float64
        )
        structure = mesh.transform(grid)
        return 0.5 * (grid * mesh.potential(structure)).sum((1, 2, 3)).reshape(2, 3).sum(1), structure, mesh

    _, structure, mesh = energy(torch.zeros(3, 3, dtype=torch.float64))
    found = mesh.strain(structure)
    assert torch.allclose(found, found.transpose(1, 2), rtol=1e-12)
    plane = torch.linalg.qr(box.cell.T)[0].T  # a slab is strained in its plane or along its normal, not sheared
    for a, b in ((0, 0), (0, 1), (1, 1), (2, 2), (0, 2), (1, 2)):
        if boundary == "slab" and (a < 2) != (b < 2):
            continue
        unit, h = torch.outer(plane[a], plane[b]), 1e-3
        unit = 0.5 * (unit + unit.T)
        steps = [energy(k * h * unit)[0] for k in (-2, -1, 1, 2)]
        slope = (8 * (steps[2] - steps[1]) - (steps[3] - steps[0])) / (12 * h)
        assert (found * unit).sum((1, 2)).tolist() == pytest.approx((-slope).tolist(), rel=1e-7)


def test_the_inverse_transform_is_the_same_in_parts(monkeypatch):
    mesh = mesh_of("periodic", NO_SPLIT)
    grid = random_grid(BOXES["periodic"].shape, torch.float64, meshes=9)
    structure = mesh.transform(grid)
    whole = mesh.potential(structure)
    for together in (1, 10_000):  # one at a time; two at a time
        monkeypatch.setattr("voltpi.potential.electrostatics.mesh._TOGETHER", together)
        assert torch.equal(mesh.potential(structure), whole)


def test_the_cache_does_not_mix_kernels():
    """Everything that a mesh is made from tells it from others; the same again is the same mesh."""
    cache = KernelCache()
    box, window = BOXES["periodic"], Resolution(10, 2.2, 0.3)
    first = (box, INVERSE, NO_SPLIT, 0.55, K_E, window, torch.float64)
    changes = {
        "cell": (0, box._replace(cell=box.cell * (1 + 1e-15))),
        "shape": (0, box._replace(shape=(16, 15, 18))),
        "boundary": (0, box._replace(boundary="open", reach=3.0)),
        "reach": (0, box._replace(reach=1.0)),
        "alpha": (1, INVERSE + 1e-12),
        "order of alpha": (1, INVERSE.flip(0)),
        "fewer channels": (1, INVERSE[:1]),
        "beta": (3, 0.5500001),
        "k_e": (4, K_E + 1e-9),
        "window": (5, Resolution(10, 2.2000001, 0.3)),
        "dtype": (6, torch.float32),
    }
    original = cache(*first)
    assert cache(*first) is original
    for name, (place, value) in changes.items():
        arguments = list(first)
        arguments[place] = value
        if name == "fewer channels":
            arguments[2] = NO_SPLIT[:1, :1]
        other = cache(*arguments)
        assert other is not original, name
        assert other.dtype == arguments[6]
        assert other.box is arguments[0]
        assert cache(*first) is original, name  # used again, so never the oldest
    assert cache(box, INVERSE, SPLIT, *first[3:]) is not original


def test_cached_kernels_give_what_new_ones_give():
    """One cache for boxes, widths and precisions in turn: answers never come from the neighbour's kernels."""
    cache = KernelCache()

    def answer(atoms, alpha, accuracy, rough, kernels):
        system = Systems.from_atoms(atoms)
        n = len(atoms)
        operator = CoulombOperator(
            system, torch.full((n,), alpha, dtype=torch.float64), -torch.ones(n, dtype=torch.float64),
            accuracy=accuracy, k_e=K_E, cache=kernels, rough=rough,
        )  # fmt: skip
        charges = torch.linspace(-1, 1, n, dtype=torch.float64)
        return operator.at(charges, torch.full((n, 3), 0.03, dtype=torch.float64))

    wide = water_box()
    wide.set_cell(wide.cell.array * 1.03)
    for _ in range(2):
        for atoms in (water_box(), wide, rattled_salt()):
            for alpha in (0.3, 0.6):
                for accuracy, rough in ((1e-3, True), (1e-3, False), (1e-6, False)):
                    one, two = (answer(atoms, alpha, accuracy, rough, k) for k in (cache, None))
                    assert torch.equal(one.energy, two.energy)
                    assert torch.equal(one.gradient, two.gradient)


# -- tabulated pairs -------------------------------------------------------------------------------------------------


def some_pairs(n=40, count=600, beta=0.45, cutoff=7.0, seed=5):
    """Pairs at all distances up to beyond the cutoff, also on the switch and nearly on top of each other."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, n, (2, count), generator=generator)  # pairs of an atom and its own image as well
    direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    distance = 1.3 * cutoff * torch.rand(count, generator=generator, dtype=torch.float64)
    distance[:100] = cutoff * (0.88 + 0.14 * distance[:100] / distance[:100].max())
    distance[100:110] = 1e-3
    vectors = direction / direction.norm(dim=1, keepdim=True) * distance[:, None]
    exponents = torch.tensor([0.3, 0.9, 4.0, 30.0], dtype=torch.float64)
    kind = torch.randint(0, len(exponents), (count,), generator=generator)
    structure = torch.zeros(count, dtype=torch.int64)
    return Pairs(index, vectors, exponents[kind], structure, beta, cutoff, (exponents, kind))


def pair_state(pairs, shells, charges):
    return PairState(pairs, charges, shells, K_E)


@pytest.fixture
def charged_sites():
    generator = torch.Generator().manual_seed(6)
    charges = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    return charges, 0.08 * torch.randn(40, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("cutoff", [7.0, 3.3])
def test_tabulated_pairs_are_the_kernels_themselves(charged_sites, cutoff):
    charges, shells = charged_sites
    pairs = some_pairs(cutoff=cutoff)
    state = pair_state(pairs, shells, charges)
    tabulated, pull = state._tabulated(), state.pull
    summed, exact_pull = state._summed(), state.pull
    assert torch.equal(state.potential, tabulated[..., 0].T)  # the tables are what is used
    scale = float(summed.abs().max())
    assert float((tabulated - summed).abs().max()) < 1e-10 * scale
    assert float((pull - exact_pull).abs().max()) < 1e-10 * float(exact_pull.abs().max())


def test_tabulated_pairs_on_two_threads(charged_sites, two_threads):
    charges, shells = charged_sites
    pairs = some_pairs(count=100_500)
    one = pair_state(pairs, shells, charges)
    torch.set_num_threads(1)
    two = pair_state(pairs, shells, charges)
    for a, b in ((one.potential, two.potential), (one.gradient, two.gradient), (one.pull, two.pull)):
        assert float((a - b).abs().max()) < 1e-12 * float(b.abs().max())


def test_forces_of_tabulated_pairs_are_derivatives_of_their_energy(charged_sites):
    """The table's slope is that of the table itself; where the switch ends and between intervals as well."""
    charges, shells = charged_sites
    pairs = some_pairs()

    def energy(vectors, shells):
        state = pair_state(pairs._replace(vectors=vectors), shells, charges)
        return 0.5 * float((charges * state.potential).sum())

    state = pair_state(pairs, shells, charges)
    h = 1e-4
    scale = float((charges[1][:, None] * state.gradient[1]).abs().max())
    for atom, axis in ((0, 0), (7, 1), (23, 2), (39, 0)):
        step = torch.zeros_like(shells)
        step[atom, axis] = h
        values = [energy(pairs.vectors, shells + k * step) for k in (-2, -1, 1, 2)]
        slope = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h)
        assert float(charges[1, atom] * state.gradient[1, atom, axis]) == pytest.approx(slope, abs=1e-9 * scale)
    scale = float(state.pull.abs().max())
    for pair, axis in ((3, 0), (60, 1), (104, 2), (350, 1), (550, 0)):
        step = torch.zeros_like(pairs.vectors)
        step[pair, axis] = h
        values = [energy(pairs.vectors + k * step, shells) for k in (-2, -1, 1, 2)]
        slope = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h)
        assert float(-state.pull[pair, axis]) == pytest.approx(slope, abs=1e-9 * scale)
    # beyond the cutoff there is nothing
    far = pairs.vectors.norm(dim=1) > pairs.cutoff + 0.8
    assert bool(far.any())
    assert not state.pull[far].any()


def test_second_derivatives_of_tabulated_pairs(charged_sites):
    """``product`` and ``linearize`` (the kernels themselves) are derivatives of the tabulated potential and field."""
    charges, shells = charged_sites
    shell_charge = charges[1]
    pairs = some_pairs()
    generator = torch.Generator().manual_seed(8)
    direction = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    state = pair_state(pairs, shells, charges)
    own = state.linearize(shell_charge)

    def gradient(step):
        moved = torch.stack([charges[0] + step * direction[:, 0], shell_charge])
        there = pair_state(pairs, shells + step * direction[:, 1:], moved)
        return torch.cat([there.potential[0][:, None], shell_charge[:, None] * there.gradient[1]], dim=1)

    h = 1e-4
    expected = (8 * (gradient(h) - gradient(-h)) - (gradient(2 * h) - gradient(-2 * h))) / (12 * h)
    found = state.product(direction)
    found[:, 1:] += shell_charge[:, None] * torch.einsum("nxy,ny->nx", own, direction[:, 1:])
    assert bool((pairs.index[0] == pairs.index[1]).any())  # an atom and its own image as well
    assert float((found - expected).abs().max()) < 1e-7 * float(expected.abs().max())


# -- choices of the operator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CompiledSites, TorchSites])
@pytest.mark.parametrize("beta", [math.inf, 0.8], ids=["mesh alone", "with pairs"])
def test_both_kinds_of_sites_make_the_same_operator(monkeypatch, kind, beta):
    """Energy, field, products and virial of a whole operator, with sites of either kind."""
    system = Systems.from_atoms([water_box(), water_box()])
    n = system.n_atoms
    generator = torch.Generator().manual_seed(4)
    charges = torch.randn(n, generator=generator, dtype=torch.float64)
    shells = 0.05 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    direction = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    alpha = torch.tensor([0.6, 3.0, 3.0] * (n // 3), dtype=torch.float64)
    chosen = Splitting(beta, 6.0, Resolution(10, 2.2, 0.3), 0.4)
    monkeypatch.setattr(kernel_cache, "choose_splitting", lambda *_, **__: chosen)

    def answers():
        shell_charge = -torch.ones(n, dtype=torch.float64)
        state = CoulombOperator(system, alpha, shell_charge, accuracy=1e-8, k_e=K_E).at(charges, shells)
        assert state.op.meshes[0].has_pairs == math.isfinite(beta)
        state.linearize()
        change = state.core_gradient_change(direction)
        return state.energy, state.gradient, state.product(direction), change, state.virial(), state.own_shell

    expected = answers()
    monkeypatch.setattr(ewald, "make_sites", lambda *arguments: kind(*arguments))
    for found, reference in zip(answers(), expected, strict=True):
        assert float((found - reference).abs().max()) < 1e-12 * max(1.0, float(reference.abs().max()))
