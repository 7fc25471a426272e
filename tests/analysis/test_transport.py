"""Diffusion and conductivity of walks, oscillators and gases whose answers are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from scipy import constants
from scipy.signal import lfilter

from tests.analysis.written_runs import BOHR, write_beads, write_run
from voltpi.analysis import ANALYSES
from voltpi.analysis.conductivity import Moment, conductivity_of, green_kubo, helfand
from voltpi.analysis.runs import Run, find_run
from voltpi.analysis.trajectory import unwrapped
from voltpi.analysis.transport import diffusion, diffusion_of, mean_squared_displacement, movers_of, species_of
from voltpi.potential.errors import InputError

KT = constants.k * 300.0 / constants.e  # eV
SI = 1.602176634e6  # S/m in 1 e/(V Å fs)


def opened(folder: Path, field: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Run:
    return find_run(folder, field=field)


def walk(rng: np.random.Generator, frames: int, n: int, step: float) -> np.ndarray:
    """Brownian positions [f, n, 3]; each step has this standard deviation per direction."""
    return np.cumsum(rng.normal(0.0, step, (frames, n, 3)), axis=0)


# -- mean squared displacement and diffusion ---------------------------------------------------------------------------


def test_transform_equals_the_double_loop() -> None:
    r = np.random.default_rng(0).normal(size=(37, 5, 3)).cumsum(axis=0) + 1e3
    direct = np.array([((r[k:] - r[: 37 - k]) ** 2).mean(axis=(0, 1)) for k in range(37)])
    assert np.allclose(mean_squared_displacement(r), direct, rtol=1e-9, atol=1e-9)


def test_random_walk_has_its_diffusion_coefficient_and_the_model_its_error() -> None:
    step, frames, n = 0.5, 400, 60
    exact = 0.5 * step**2 / 10.0 * 0.1  # cm²/s, 10 fs a step
    found = [diffusion("W", walk(np.random.default_rng(k), frames, n, step), 10.0, 3.0) for k in range(24)]
    relative = np.array([d.d for d in found]) / exact - 1.0
    assert abs(relative.mean()) < 4.0 * relative.std(ddof=1) / np.sqrt(24)
    hops = n * np.mean([d.msd.sum(axis=1).max() for d in found]) / 9.0
    assert np.mean([d.hops for d in found]) == pytest.approx(hops)
    model = 3.43 / np.sqrt(hops) + 0.04
    assert found[0].relative_error == pytest.approx(3.43 / np.sqrt(found[0].hops) + 0.04)
    # hops of 3 Å made of many small steps: the model and the actual scatter agree within a factor of two
    assert 0.5 * model < np.sqrt((relative**2).mean()) < 2.0 * model
    assert found[0].fitted is not None
    assert found[0].fitted[1] == pytest.approx(10.0 * 199)
    first = found[0].fitted[0]
    assert found[0].msd.sum(axis=1)[int(first / 10.0)] > 4.5 >= found[0].msd.sum(axis=1)[int(first / 10.0) - 1]


def test_an_oscillator_does_not_diffuse(tmp_path: Path) -> None:
    """Overdamped in a well: MSD(t) = 6 s² (1 − e^{−t/τ})."""
    rng = np.random.default_rng(3)
    s, tau, f, n = 0.3, 5.0, 1500, 30
    x = np.zeros((f, n, 3))
    x[0] = rng.normal(0.0, s, (n, 3))
    for k in range(1, f):
        x[k] = np.exp(-1.0 / tau) * x[k - 1] + rng.normal(0.0, s * np.sqrt(1.0 - np.exp(-2.0 / tau)), (n, 3))
    sites = rng.uniform(0.0, 12.0, (n, 3))
    folder = write_run(tmp_path, ["Li"] * 15 + ["F"] * 15, x + sites, np.full(3, 12.0))
    found = diffusion_of(opened(folder), hop=3.0)
    assert [d.name for d in found] == ["Li", "F"]
    masses = np.where(np.arange(n) < 15, 6.94, 18.998)
    for d, mine in zip(found, (masses == 6.94, masses != 6.94), strict=True):
        assert d.fitted is None
        assert np.isnan(d.d)
        assert "no diffusion to be seen" in d.report()
        # each atom against the common centre of mass, which moves a little
        share = masses / masses.sum()
        reduced = ((np.eye(n) - share) ** 2).sum(axis=1)[mine].mean()
        for lag in (1, 5, 20, 60):
            expected = 6.0 * s**2 * reduced * (1.0 - np.exp(-lag / tau))
            assert d.msd[lag].sum() == pytest.approx(expected, rel=0.06)


def test_wrapping_and_a_breathing_cell_do_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    r = walk(rng, 300, 12, 0.3) + rng.uniform(0.0, 10.0, (12, 3))
    r -= (r.mean(axis=1) - r[0].mean(axis=0))[:, None]
    edges = np.array([10.0, 11.0, 12.0])
    outright = unwrapped(opened(write_run(tmp_path / "a", ["Ar"] * 12, r, edges))).without_drift()
    folded = unwrapped(opened(write_run(tmp_path / "b", ["Ar"] * 12, r % edges, edges))).without_drift()
    assert np.allclose(outright - outright[0], r - r[0], atol=1e-7)
    assert np.allclose(folded - folded[0], r - r[0], atol=1e-7)
    # atoms that a barostat carries along, far from the origin or not, have not moved
    scale = 1.0 + 0.05 * np.sin(np.arange(300))[:, None, None]
    carried = write_run(tmp_path / "c", ["Ar"] * 12, (r[0] + 50.0) * scale, edges * scale[:, 0])
    assert mean_squared_displacement(unwrapped(opened(carried)).positions).max() < 1e-12


def test_drift_of_the_whole_is_taken_out_unless_atoms_are_held(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    drift = 0.2 * np.arange(50)[:, None, None] * np.array([1.0, 0.0, 0.0])
    r = rng.uniform(0.0, 15.0, (8, 3)) + drift
    path = unwrapped(opened(write_run(tmp_path / "a", ["Na"] * 4 + ["Cl"] * 4, r, np.full(3, 15.0))))
    assert mean_squared_displacement(path.without_drift()).max() < 1e-12
    r[:, 4:] = r[0, 4:]
    path = unwrapped(opened(write_run(tmp_path / "b", ["Na"] * 4 + ["Cl"] * 4, r, np.full(3, 15.0))))
    assert path.still.tolist() == [False] * 4 + [True] * 4
    movers = movers_of(path, "element")
    assert [mover.species.name for mover in movers] == ["Na"]
    assert mean_squared_displacement(movers[0].positions)[10, 0] == pytest.approx(4.0)


def test_centroids_of_beads_diffuse(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    centre = walk(rng, 60, 3, 0.2) + 5.0
    away = rng.normal(0.0, 0.4, (60, 3, 3))
    folder = write_run(tmp_path, ["H"] * 3, centre, np.full(3, 10.0))
    write_beads(folder, ["H"] * 3, [centre + away, (centre - away) % 10.0], np.full((60, 3), 10.0))
    found = unwrapped(opened(folder)).positions
    assert np.allclose(found - found[0], centre - centre[0], atol=1e-7)


def test_molecules_move_as_their_centres_of_mass(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    masses = np.array([15.999, 1.008, 1.008])
    water -= masses @ water / masses.sum()
    centres = walk(rng, 80, 4, 0.2) + np.array([[2.0, 2, 2], [6, 2, 2], [2, 6, 2], [6, 6, 6]])
    turns = np.linalg.qr(rng.normal(size=(80, 4, 3, 3)))[0]
    turns[0] = np.eye(3)
    atoms = (np.einsum("fnij,aj->fnai", turns, water) + centres[:, :, None]).reshape(80, 12, 3)
    path = unwrapped(opened(write_run(tmp_path, ["O", "H", "H"] * 4, atoms % 8.0, np.full(3, 8.0))))
    found = movers_of(path, "auto")
    assert [(mover.species.name, mover.species.atoms.shape) for mover in found] == [("H2O", (4, 3))]
    centres -= (centres.mean(axis=1) - centres[0].mean(axis=0))[:, None]
    moved = found[0].positions - found[0].positions[0]
    assert np.allclose(moved, centres - centres[0], atol=1e-6)


def test_a_network_has_no_molecules() -> None:
    crystal = Atoms(
        "TiO3", scaled_positions=[[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], cell=[3.9] * 3, pbc=True
    )
    assert [species.name for species in species_of(crystal * 2)] == ["Ti", "O"]
    with pytest.raises(InputError, match="no molecules: give --by element"):
        species_of(crystal, "molecule")


def test_finite_size_correction(tmp_path: Path) -> None:
    r = walk(np.random.default_rng(8), 300, 10, 0.3)
    cubic = opened(write_run(tmp_path / "a", ["Ar"] * 10, r, np.full(3, 20.0)))
    found = diffusion_of(cubic, viscosity=0.85, hop=2.0)[0]
    # k_B T ξ / 6πηL = 4.141947e-21 J · 2.837297 / (6π · 0.85e-3 Pa s · 2e-9 m) = 3.66741e-10 m²/s
    assert found.correction == pytest.approx(3.66741e-6, rel=1e-5)
    assert "in an infinite cell" in found.report()
    with pytest.raises(InputError, match="not cubic"):
        diffusion_of(opened(write_run(tmp_path / "b", ["Ar"] * 10, r, np.array([20.0, 20, 21]))), viscosity=0.85)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hop": 0.0}, "hop is 0"),
        ({"upper": 1.5}, "upper is 1.5"),
        ({"viscosity": -1.0}, "viscosity is -1"),
        ({"skip": 1e5}, "nothing is left"),
    ],
)
def test_msd_refuses(tmp_path: Path, options: dict[str, object], words: str) -> None:
    run = opened(write_run(tmp_path, ["Ar"] * 4, walk(np.random.default_rng(1), 40, 4, 0.3), np.full(3, 20.0)))
    with pytest.raises(InputError, match=words):
        diffusion_of(run, **options)  # type: ignore[arg-type]


# -- conductivity ------------------------------------------------------------------------------------------------------

PAIRS = 12


def ions(seed: int = 11, frames: int = 700, step: float = 0.3) -> np.ndarray:
    """Independent Na and Cl [f, 24, 3], 10 fs a frame, in a cell of 15 Å."""
    rng = np.random.default_rng(seed)
    return walk(rng, frames, 2 * PAIRS, step) + rng.uniform(0.0, 15.0, (2 * PAIRS, 3))


def salt(folder: Path, r: np.ndarray, **extras: np.ndarray) -> Path:
    write_run(folder, ["Na"] * PAIRS + ["Cl"] * PAIRS, r, np.full(3, 15.0), 10.0, extras=extras)
    (folder / "q.csv").write_text("element,charge\nNa,1\nCl,-1\n")
    return folder


def exact(step: float = 0.3, q2: float = 1.0) -> float:
    """n q² D / V k_B T, S/m."""
    return 2 * PAIRS * q2 * 0.5 * step**2 / 10.0 / (15.0**3 * KT) * SI


def test_independent_ions(tmp_path: Path) -> None:
    folder = salt(tmp_path, ions() % 15.0)
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.05, 0.3))
    (collective,) = found.collective
    assert collective.error < 0.2 * exact()
    assert collective.sigma == pytest.approx(exact(), abs=3.5 * collective.error)
    assert found.kubo.sigma == pytest.approx(exact(), abs=3.5 * found.kubo.error)
    assert found.nernst_einstein is not None
    assert found.nernst_einstein.sigma == pytest.approx(exact(), rel=0.15)
    assert found.haven[0] == pytest.approx(1.0, abs=3.5 * found.haven[1])
    assert found.charges == (1.0, -1.0)
    assert found.drift is None


def test_the_error_of_a_collective_walk_is_its_scatter() -> None:
    sigma, errors = [], []
    scale = 1.0 / (15.0**3 * KT)
    exact_sigma = 3 * 0.5 * 2.0**2 / 3.0 / 10.0 * scale * SI  # ⟨ΔM²⟩ = 3 · 2² e²Å² a step of 10 fs
    for seed in range(40):
        moment = Moment("m", "m", np.random.default_rng(seed).normal(0.0, 2.0, (800, 3)).cumsum(axis=0), 10.0)
        found = helfand(moment, scale, (50.0, 400.0))
        sigma.append(found.sigma)
        errors.append(found.error)
    relative = np.array(sigma) / exact_sigma - 1.0
    assert abs(relative.mean()) < 3.5 * relative.std(ddof=1) / np.sqrt(40)
    stated = np.sqrt(np.mean(np.square(errors))) / exact_sigma
    assert 0.6 < np.sqrt((relative**2).mean()) / stated < 1.6


def test_current_with_memory_has_its_integral() -> None:
    """⟨Ṁ(0)·Ṁ(t)⟩ = 3 v² e^{−t/τ}: the running integral is 3 v² τ (1 − e^{−t/τ})."""
    rng = np.random.default_rng(9)
    tau, spacing, n, v = 100.0, 5.0, 200_000, 0.01
    keep = np.exp(-spacing / tau)
    noise = rng.normal(0.0, v * np.sqrt(1.0 - keep**2), (n, 3))
    current = lfilter([1.0], [1.0, -keep], noise, axis=0)
    scale = 1.0 / (15.0**3 * KT)
    lags, running, value, error = green_kubo(current, spacing, scale, (600.0, 1000.0))
    limit = v**2 * tau * scale * SI
    expected = limit * (1.0 - np.exp(-lags / tau))
    assert error < 0.06 * limit
    assert value == pytest.approx(limit, abs=3.5 * error + 0.01 * limit)
    assert np.allclose(running, expected, atol=0.1 * limit)


def test_pairs_that_stay_together_do_not_conduct(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    centre = walk(rng, 700, PAIRS, 0.3) + rng.uniform(0.0, 15.0, (PAIRS, 3))
    r = np.concatenate([centre + rng.normal(0, 0.1, centre.shape), centre + 2.0], axis=1)
    folder = salt(tmp_path, r)
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.05, 0.5))
    assert abs(found.collective[0].sigma) < 0.02 * exact()
    assert found.nernst_einstein is not None
    assert found.nernst_einstein.sigma == pytest.approx(exact(), rel=0.3)


def test_what_is_bound_does_not_change_sigma(tmp_path: Path) -> None:
    """Dipole with shells, whole charges, Born charges: one conductivity."""
    rng = np.random.default_rng(13)
    r = ions()
    q = np.repeat([1.0, -1.0], PAIRS)
    dipole = np.einsum("n,fnk->fk", q, r) + rng.normal(0.0, 0.5, (700, 3))  # and shells that shake
    # Born charges are the slope of q x + c sin(kx + φ), which is as good a dipole
    born = np.einsum("n,ab->nab", q, np.eye(3)) * np.ones((700, 1, 1, 1))
    born[..., 0, 0] += 0.3 * np.cos(0.9 * r[..., 0] + rng.uniform(0.0, 2 * np.pi, 2 * PAIRS))
    born = born.reshape(700, 6 * PAIRS, 3)
    folder = salt(tmp_path, r % 15.0, dipole=(dipole % 15.0) / BOHR, BEC=born)
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.05, 0.4))
    assert [h.moment.key for h in found.collective] == ["dipole", "charges", "born"]
    of_dipole, of_charges, of_born = (h.sigma for h in found.collective)
    assert of_dipole == pytest.approx(of_charges, rel=0.03)
    assert of_born == pytest.approx(of_charges, rel=0.03)
    axes = [h.sigma_axes for h in found.collective]
    assert axes[2][1:] == pytest.approx(axes[1][1:], rel=1e-6)
    assert axes[2][0] != axes[1][0]
    # constant Born charges are charges
    born = np.einsum("n,ab->nab", q, np.eye(3)).reshape(1, -1, 3).repeat(700, axis=0)
    folder = salt(tmp_path / "same", r % 15.0, BEC=born)
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.05, 0.4))
    assert found.collective[1].sigma == pytest.approx(found.collective[0].sigma, rel=1e-9)


def test_drift_in_a_field(tmp_path: Path) -> None:
    """Ions with a mobility of their own: Ohm's law, and the equilibrium estimates are not touched by the drift."""
    field = 0.02  # V/Å
    r = ions()
    q = np.repeat([1.0, -1.0], PAIRS)
    mobility = 0.5 * 0.3**2 / 10.0 / KT  # Å²/(V fs), Einstein
    t = 10.0 * np.arange(700)
    flowing = r.copy()
    flowing[..., 1] += t[:, None] * q * mobility * field
    folder = salt(tmp_path / "flow", flowing % 15.0)
    found = conductivity_of(opened(folder, (0.0, field, 0.0)), charges=folder / "q.csv", fit=(0.05, 0.3))
    at_rest = conductivity_of(opened(folder := salt(tmp_path / "rest", r)), charges=folder / "q.csv", fit=(0.05, 0.3))
    assert found.drift is not None
    assert found.drift.sigma == pytest.approx(exact(), abs=3.5 * found.drift.error)
    moment = at_rest.collective[0].moment.values
    random_part = (moment[-1] - moment[0])[1] / t[-1] / (15.0**3 * field) * SI
    assert found.drift.sigma == pytest.approx(exact() + random_part, rel=1e-6)
    assert 0.01 < found.drift.error / exact() < 0.5
    assert found.collective[0].sigma == pytest.approx(at_rest.collective[0].sigma, rel=0.1)
    assert found.nernst_einstein is not None
    assert at_rest.nernst_einstein is not None
    assert found.nernst_einstein.sigma == pytest.approx(at_rest.nernst_einstein.sigma, rel=0.1)


def test_charges_that_change_are_averaged_and_said(tmp_path: Path) -> None:
    q = np.repeat([0.8, -0.8], PAIRS) + 0.05 * np.where(np.arange(700) % 2 == 0, 1, -1)[:, None]
    folder = salt(tmp_path, ions(), charges=q)
    run = opened(folder)
    found = conductivity_of(run, fit=(0.05, 0.3))
    assert found.collective[0].sigma == pytest.approx(
        0.64 * conductivity_of(run, charges=folder / "q.csv", fit=(0.05, 0.3)).collective[0].sigma, rel=1e-6
    )
    assert any("change with time, by 0.05 e" in note for note in found.notes)


def held(folder: Path, displacement: str) -> Run:
    (folder / "settings.yaml").write_text(f"model: none\ndisplacement: {displacement}\n")
    return find_run(folder)


def test_at_constant_displacement_the_axis_does_not_count(tmp_path: Path) -> None:
    """M along it is bound, as D holds it: here it does not move at all, and the other two conduct."""
    r = ions()
    q = np.repeat([1.0, -1.0], PAIRS)
    r[..., 2] -= np.outer(r[..., 2] @ q, q / len(q))
    folder = salt(tmp_path, r % 15.0)
    options = {"charges": folder / "q.csv", "fit": (0.05, 0.3)}
    plain = conductivity_of(opened(folder), **options)  # type: ignore[arg-type]
    found = conductivity_of(held(folder, "[null, null, 0.1]"), **options)  # type: ignore[arg-type]
    assert abs(plain.collective[0].sigma_axes[2]) < 1e-9 * exact()
    assert found.collective[0].sigma == pytest.approx(1.5 * plain.collective[0].sigma, rel=1e-9)
    assert found.collective[0].sigma == pytest.approx(exact(), abs=3.5 * found.collective[0].error)
    assert found.kubo.sigma == pytest.approx(1.5 * plain.kubo.sigma, rel=1e-9)
    assert found.drift is None
    by_axis = found.numbers()["sigma_axes_S_per_m"]["charges"]
    assert by_axis[:2] == pytest.approx(plain.collective[0].sigma_axes[:2])
    assert np.isnan(by_axis[2])
    assert any("along x, y alone, at constant field there" in note for note in found.numbers()["notes"])
    assert any("along x, y alone" in line for line in found.report())
    header, table = found.table()
    assert header[2] == "dM2_per_4VkTt_charges_S_per_m"
    assert table[10, 2] == pytest.approx(1.5 * plain.table()[1][10, 2])
    with pytest.raises(InputError, match=r"the conductivity takes an axis at constant field, and there is none"):
        conductivity_of(held(folder, "[0, 0, 0.1]"), **options)  # type: ignore[arg-type]
    moving = conductivity_of(held(folder, "[null, null, {ramp: {start: 0, rate: 1, until: 1}}]"), **options)  # type: ignore[arg-type]
    assert any("one that is driven is not" in note for note in moving.notes)
    assert not any("equilibrium" in note for note in (*found.notes, *moving.notes))


def test_a_drift_along_the_free_axes_at_constant_displacement(tmp_path: Path) -> None:
    r = ions()
    q = np.repeat([1.0, -1.0], PAIRS)
    r[..., 1] += 10.0 * np.arange(700)[:, None] * q * 2e-3
    folder = salt(tmp_path, r % 15.0)
    (folder / "settings.yaml").write_text("model: none\nfield: [0, 0.02, 0]\ndisplacement: [null, null, 0.1]\n")
    found = conductivity_of(find_run(folder), charges=folder / "q.csv", fit=(0.05, 0.3))
    alone = conductivity_of(opened(folder, (0.0, 0.02, 0.0)), charges=folder / "q.csv", fit=(0.05, 0.3))
    assert found.drift is not None
    assert alone.drift is not None
    assert found.drift.sigma == pytest.approx(alone.drift.sigma, rel=1e-9)
    assert found.drift.sigma > 24 * 2e-3 / (15.0**3 * 0.02) * SI * 0.5


def test_a_crystal_does_not_conduct(tmp_path: Path) -> None:
    """Vibrations have a slope of ⟨ΔM²⟩ and a running integral; without diffusion neither is a conductivity."""
    rng = np.random.default_rng(21)
    sites = rng.uniform(0.0, 15.0, (2 * PAIRS, 3))
    r = lfilter([0.2], [1.0, -0.8], rng.normal(0.0, 0.5, (700, 2 * PAIRS, 3)), axis=0) + sites
    folder = salt(tmp_path / "run", r % 15.0)
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.01, 0.05))
    assert all(d.fitted is None for d in found.diffusion)
    assert any("vibrations rather than of conduction" in note for note in found.notes)  # a window that was asked for
    moment = Moment("m", "m", found.collective[0].moment.values, 10.0)
    assert helfand(moment, 1.0 / (15.0**3 * KT), (10.0, 50.0)).sigma > 100.0
    answer = ANALYSES["conductivity"].run(
        [folder], tmp_path / "out", charges=str(folder / "q.csv"), field=(0.0, 0.0, 0.0)
    )
    assert [e["sigma_S_per_m"] for e in answer["estimates"]] == [None, None]
    assert answer["sigma_axes_S_per_m"]["charges"] == [None, None, None]
    assert answer["haven_ratio"] is None
    assert any("no charged species (Na, Cl) diffuses" in note for note in answer["notes"])
    assert any(line.startswith("Einstein-Helfand no σ") for line in answer["report"])
    # charges that nobody knows may be those of what does not move
    q = np.repeat([1.0, -1.0], PAIRS)
    (folder / "q.csv").unlink()
    dipoles = salt(tmp_path / "dipole", r % 15.0, dipole=np.einsum("n,fnk->fk", q, r) / BOHR)
    assert np.isnan(conductivity_of(opened(dipoles)).collective[0].sigma)


def test_lines_begin_after_a_vibration(tmp_path: Path) -> None:
    folder = salt(tmp_path, ions())
    found = conductivity_of(opened(folder), charges=folder / "q.csv")  # of 6.99 ps
    assert found.collective[0].fitted == (200.0, 400.0)
    long = salt(tmp_path / "long", ions(frames=3001))
    found = conductivity_of(opened(long), charges=long / "q.csv")
    assert found.collective[0].fitted == pytest.approx((300.0, 1500.0))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_breathing_cell_does_not_conduct(tmp_path: Path, stride: int) -> None:
    """The dipole of ions that a barostat carries along, on a finer grid than their positions or on the same."""
    q = np.repeat([1.0, -1.0], PAIRS)
    scale = 1.0 + 0.02 * np.sin(0.3 * np.arange(700))
    cells = 15.0 * scale[:, None] * np.ones(3)
    r = ions() * scale[:, None, None]
    dipole = np.einsum("n,fnk->fk", q, r + 3.0 * cells[:, None, :] * (q > 0)[:, None])
    folder = tmp_path / "run"
    names = ["Na"] * PAIRS + ["Cl"] * PAIRS
    write_run(folder, names, r % cells[:, None], cells, 10.0, extras={"dipole": dipole % cells / BOHR})
    if stride > 1:
        frames = (folder / "run.pos_0.xyz").read_text().splitlines(keepends=True)
        size = 2 * PAIRS + 2
        kept = [line for k in range(0, 700, stride) for line in frames[k * size : (k + 1) * size]]
        (folder / "run.pos_0.xyz").write_text("".join(kept))
    (folder / "q.csv").write_text("element,charge\nNa,1\nCl,-1\n")
    found = conductivity_of(opened(folder), charges=folder / "q.csv", fit=(0.06, 0.4))
    of_dipole, of_charges = found.collective
    assert [h.moment.key for h in found.collective] == ["dipole", "charges"]
    assert of_dipole.moment.spacing == pytest.approx(10.0 * stride)
    assert of_dipole.sigma == pytest.approx(of_charges.sigma, rel=1e-5)
    assert any("without affine motion" in note for note in found.notes)
    affine = helfand(Moment("m", "m", dipole, 10.0), 1.0 / (15.0**3 * KT), (60.0, 400.0))
    assert abs(affine.sigma / of_charges.sigma - 1.0) > 0.2
    assert affine.squares[5].sum() > 2.0 * of_dipole.squares[5 // stride].sum()


def test_a_dipole_that_misses_the_frames_is_cautioned(tmp_path: Path) -> None:
    q = np.repeat([1.0, -1.0], PAIRS)
    cells = 15.0 * (1.0 + 0.02 * np.sin(0.3 * np.arange(300)))[:, None] * np.ones(3)
    r = ions(frames=300)
    folder = tmp_path / "run"
    write_run(folder, ["Na"] * PAIRS + ["Cl"] * PAIRS, r % cells[:, None], cells, 10.0)
    dipole = np.einsum("n,fnk->fk", q, r) / BOHR
    records = [
        f"#EXTRAS(dipole)# Step:  {k}  Bead:  0\n{' '.join(map(repr, dipole[k].tolist()))}\n" for k in range(300)
    ]
    (folder / "run.dipole_0").write_text("".join(records[1::2]))
    text = (folder / "run.pos_0.xyz").read_text().splitlines(keepends=True)
    size = 2 * PAIRS + 2
    (folder / "run.pos_0.xyz").write_text(
        "".join(line for k in range(0, 300, 2) for line in text[k * size : (k + 1) * size])
    )
    found = conductivity_of(opened(folder), fit=(0.1, 0.4))
    assert any(note.startswith("caution: the cell changes") for note in found.notes)


def test_the_commands(tmp_path: Path) -> None:
    folder = salt(tmp_path / "run", ions(frames=300))
    answer = ANALYSES["conductivity"].run(
        [folder], tmp_path / "out", charges=str(folder / "q.csv"), fit=(0.05, 0.2), field=(0.0, 0.0, 0.0)
    )
    names = [Path(path).name for path in answer["files"]]
    assert names == [f"conductivity{end}" for end in (".csv", ".json", ".png", ".svg", "-green-kubo.csv")]
    numbers = json.loads((tmp_path / "out" / "conductivity.json").read_text())
    assert [e["method"] for e in numbers["estimates"]] == ["Einstein-Helfand", "Green-Kubo", "Nernst-Einstein"]
    assert numbers["ions"]["Na"]["charge_e"] == 1.0
    answer = ANALYSES["msd"].run([folder], tmp_path / "out")
    table = np.genfromtxt(answer["files"][0], delimiter=",", names=True)
    assert table["lag_fs"][2] == 20.0
    assert table["msd_Na_A2"][1] == pytest.approx(3 * 0.3**2, rel=0.15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": (0.1, 20.0)}, "within the 1.99 ps of the run"),
        ({"fit": (0.1, 1.95)}, "too few"),
        ({"temperature": -3.0}, "temperature is -3"),
        ({"charges": None}, "no charges of atoms"),
    ],
)
def test_conductivity_refuses(tmp_path: Path, options: dict[str, object], words: str) -> None:
    folder = salt(tmp_path, ions(frames=200))
    with pytest.raises(InputError, match=words):
        conductivity_of(opened(folder), **{"charges": folder / "q.csv", **options})  # type: ignore[arg-type]


# -- a gas that i-PI moves ---------------------------------------------------------------------------------------------

GAS = """<simulation verbosity='low'>
  <output prefix='run'>
    <properties stride='6' filename='out'> [ step, time{femtosecond}, temperature{kelvin} ] </properties>
    <trajectory filename='pos' stride='6' format='ase'> positions </trajectory>
    <trajectory filename='vel' stride='6' cell_units='angstrom'> velocities </trajectory>
  </output>
  <total_steps> 4800 </total_steps>
  <prng><seed> 5 </seed></prng>
  <ffdirect name='gas'><pes> gas </pes></ffdirect>
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 1000 </velocities>
    </initialize>
    <forces><force forcefield='gas'/></forces>
    <ensemble><temperature units='kelvin'> 1000 </temperature></ensemble>
    <motion mode='dynamics'>
      <fixcom> False </fixcom>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 5.0 </timestep>
        <thermostat mode='langevin'><tau units='femtosecond'> 100 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""


def test_a_langevin_gas_of_plain_ipi(tmp_path: Path) -> None:
    """D = k_B T τ/m for every ion, σ = Σ q² D / V k_B T, from another program's files and charges in a table."""
    rng = np.random.default_rng(14)
    edge = 30.0
    gas = Atoms("Na20Cl20", positions=rng.uniform(0.0, edge, (40, 3)), cell=[edge] * 3, pbc=True)
    write(str(tmp_path / "start.xyz"), gas, format="extxyz")
    (tmp_path / "input.xml").write_text(GAS)
    (tmp_path / "q.csv").write_text("element,charge\nNa,1\nCl,-1\n")
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=True)
    thermal = constants.k * 1000.0 / constants.atomic_mass  # m²/s² amu
    run = ANALYSES["msd"].run([tmp_path], tmp_path / "o")
    for name, mass in (("Na", 22.98977), ("Cl", 35.45)):
        d = run["species"][name]
        # the others carry the centre of mass, so each ion moves less against it
        reduced = 1.0 - mass / (20 * (22.98977 + 35.45))
        assert d["D_cm2_per_s"] == pytest.approx(
            thermal / mass * 1e-13 * 1e4 * reduced, abs=3.0 * d["D_error_cm2_per_s"]
        )
        assert d["D_error_cm2_per_s"] < 0.25 * d["D_cm2_per_s"]
    found = ANALYSES["conductivity"].run([tmp_path], tmp_path / "o", charges=str(tmp_path / "q.csv"), fit=(0.42, 1.5))
    sigma = 20 * (1 / 22.98977 + 1 / 35.45) * 1e-13 * constants.e**2 / constants.atomic_mass / (edge * 1e-10) ** 3
    by_method = {e["method"]: e for e in found["estimates"]}
    assert set(by_method) == {"Einstein-Helfand", "Green-Kubo", "Nernst-Einstein"}
    assert "velocities" in by_method["Green-Kubo"]["source"]
    for e in by_method.values():
        assert e["sigma_S_per_m"] == pytest.approx(sigma, abs=3.0 * e["sigma_error_S_per_m"])
        assert e["sigma_error_S_per_m"] < 0.35 * sigma
    assert found["temperature_K"] == pytest.approx(1000.0, rel=0.03)
