"""Charges that are trained together with a network: gradients of the loss, the same numbers as a run, trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from voltpi.potential.checkpoints import load_potential, save_potential
from voltpi.potential.electrostatics.pqeq import ElementParameters, PQEq, read_parameters
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.model import Potential
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems
from voltpi.potential.training import trainer as trainer_module
from voltpi.potential.training.config import TrainConfig
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.joint import JointCharges
from voltpi.potential.training.loss import Batch, Loss, collate, pack, predict
from voltpi.potential.training.storage import read_weights
from voltpi.potential.training.trainer import Trainer

from training_toys import CUTOFF, TinyNetwork, flexible_water

TABLE = {symbol: row for symbol, row in read_parameters().items() if symbol in ("H", "O", "Na")}
FIELD = (0.1, 0.05, -0.07)
WEIGHTS = {"dipole": 0.5, "polarizability": 1.0, "born_charges": 2.0}


def dimer(seed: int, *, cell: bool) -> Atoms:
    atoms = flexible_water(2, seed, box=5.0 if cell else 6.0)
    if cell:
        atoms.set_cell([[5, 0, 0], [0.5, 5.2, 0], [0, 0.3, 4.8]])
    atoms.pbc = cell
    return atoms


def sample(
    atoms: Atoms,
    frame: int = 0,
    *,
    field: Sequence[float] = (0.0, 0.0, 0.0),
    observed: Mapping[str, np.ndarray] | None = None,
    path: str = "set.xyz",
) -> Sample:
    """A structure with labels drawn at random."""
    rng = np.random.default_rng(frame)
    systems = Systems.from_atoms(atoms, field=np.array(field))
    found = neighbor_list(systems, CUTOFF)
    return Sample(
        dataset="water",
        path=path,
        frame=frame,
        systems=systems,
        edge_index=found.index,
        vectors=found.vectors,
        energy=float(rng.normal()),
        forces=torch.tensor(rng.normal(size=(len(atoms), 3))),
        stress=torch.tensor(np.diag(rng.normal(size=3))) if atoms.pbc.all() else None,
        observed=observed or {},
    )


def pqeq(**options: object) -> PQEq:
    settings = {"parameters": TABLE, "response": "all", "conserve": "fragments", "tolerance": 1e-11, "accuracy": 1e-11}
    return PQEq(**{**settings, **options})  # type: ignore[arg-type]


def mixed() -> list[Sample]:
    """A cluster and a cell in fields, another of each without; labels of charges in some."""
    dipole, alpha = np.array([0.3, -0.2, 0.1]), np.diag([2.5, 3.0, 2.0])
    born = np.random.default_rng(1).normal(scale=0.5, size=(6, 3, 3))
    return [
        sample(dimer(0, cell=True), 0, field=FIELD, observed={"polarizability": alpha}),
        sample(dimer(1, cell=False), 1, field=FIELD, observed={"dipole": dipole, "polarizability": alpha}),
        sample(dimer(2, cell=True), 2, observed={"dipole": dipole}),
        sample(dimer(3, cell=False), 3, observed={"born_charges": born}),
    ]


def batched(charges: JointCharges, samples: Sequence[Sample], dtype: torch.dtype = torch.float64) -> Batch:
    return collate([pack(s, dtype=dtype)._replace(charged=(charges.add(s),)) for s in samples])


# -- one batch -------------------------------------------------------------------------------------------------------


def test_gradient_of_the_loss() -> None:
    """Every term against its differences, in χ, η, R and K of oxygen."""
    weights = {"energy": 1.0, "forces": 1.0, "stress": 50.0}
    terms = {key: Loss(**{k: w if k == key else 0.0 for k, w in weights.items()}) for key in weights}
    samples = mixed()
    charges = JointCharges(pqeq(), samples, weights=WEIGHTS)
    batch = batched(charges, samples)
    network = TinyNetwork().double()

    def values() -> dict[str, torch.Tensor]:
        answer = predict(network, batch, create_graph=True, charges=charges)
        assert answer.misfit is not None
        plain = answer._replace(misfit=None)
        return {"misfit": answer.misfit.sum(), **{key: loss(plain, batch) for key, loss in terms.items()}}

    found = values()
    names, frees = list(charges.elements.free), list(charges.elements.free.values())
    gradients = {key: torch.autograd.grad(value, frees, retain_graph=True) for key, value in found.items()}
    h = 2e-3
    for i, free in enumerate(frees):
        start = float(free.detach()[1])
        ends = []
        for times in (-2, -1, 1, 2):
            with torch.no_grad():
                free[1] = start + times * h
            ends.append({key: float(value.detach()) for key, value in values().items()})
        with torch.no_grad():
            free[1] = start
        for key, gradient in gradients.items():
            numeric = (8 * (ends[2][key] - ends[1][key]) - (ends[3][key] - ends[0][key])) / (12 * h)
            scale = max(float(g.abs().max()) for g in gradient)
            assert scale > 1e-3
            assert float(gradient[i][1]) == pytest.approx(numeric, rel=1e-7, abs=1e-7 * scale), (key, names[i])


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-10), ("single", 1e-6)])
def test_training_has_the_numbers_of_a_run(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Energy, forces and stress of a batch against the saved model, with a table that has moved."""
    samples = mixed()
    charges = JointCharges(pqeq(), samples)
    with torch.no_grad():
        for free in charges.elements.free.values():
            free += 0.2 * torch.linspace(-1, 1, len(free), dtype=torch.float64)
    torch.manual_seed(0)
    network = NequIP((1, 8), hidden_irreps="4x0e+4x1o", layers=1, r_max=CUTOFF, n_basis=4, radial_hidden=8)
    dtype = torch.float64 if precision == "double" else torch.float32
    batch = batched(charges, samples, dtype)
    answer = predict(network.to(dtype), batch, create_graph=False, charges=charges)
    save_potential(tmp_path / "model.safetensors", Potential(network.to(torch.float32), charges.trained_model), {})
    potential = load_potential(tmp_path / "model.safetensors", precision=precision)
    assert isinstance(potential.charges, PQEq)
    assert potential.charges.parameters["O"] == charges.elements.table()["O"]
    assert potential.charges.parameters["Na"] == TABLE["Na"]
    first = 0
    for b, one in enumerate(samples):
        run = potential(potential.prepare(one.systems))
        n = one.systems.n_atoms
        scale = max(1.0, float(run.forces.abs().max()), abs(float(run.energy)))
        assert abs(float(answer.energy[b]) - float(run.energy)) < tolerance * scale
        torch.testing.assert_close(
            answer.forces[first : first + n].double(), run.forces, rtol=0, atol=tolerance * scale
        )
        first += n
        if one.stress is not None:
            assert answer.stress is not None
            stress = -0.5 * (run.virial[0] + run.virial[0].T) / one.volume
            torch.testing.assert_close(answer.stress[b].double(), stress, rtol=0, atol=tolerance * scale)


def test_misfit_is_the_relative_squared_error() -> None:
    samples = mixed()
    charges = JointCharges(pqeq(), samples, weights={"dipole": 2.0, "born_charges": 3.0})
    part = charges([charges.add(s) for s in samples], stress=False)
    answers = [pqeq().solve(assign_fragments(s.systems), born_charges=True) for s in samples]
    born = samples[3].observed["born_charges"]
    assert answers[3].born_charges is not None
    relative = float(np.square(answers[3].born_charges.numpy() - born).sum() / np.square(born).sum())
    assert float(part.misfit[3].detach()) == pytest.approx(3.0 * len(samples) * relative)
    labels = [samples[k].observed["dipole"] for k in (1, 2)]
    error = np.square(answers[1].dipole[0].numpy() - labels[0]).sum()
    assert float(part.misfit[1].detach()) == pytest.approx(2.0 * len(samples) * error / np.square(labels).sum())
    assert float(part.misfit[0].detach()) == 0


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_on_is_refused() -> None:
    slab = dimer(0, cell=True)
    slab.pbc = (True, True, False)
    charges = JointCharges(pqeq(), [sample(slab, 3)])
    with pytest.raises(InputError, match=r"set.xyz, frame 3: charges are fitted to clusters and to cells periodic"):
        charges.add(sample(slab, 3))
    with pytest.raises(InputError, match=r"set.xyz, frame 5: is in a field, but charges.response is shells"):
        JointCharges(pqeq(response="shells"), [sample(dimer(0, cell=False))]).add(
            sample(dimer(0, cell=False), 5, field=FIELD)
        )
    with pytest.raises(InputError, match="no frame has such a label"):
        JointCharges(pqeq(), [sample(dimer(0, cell=False))], weights={"dipole": 1.0})


# -- trainings -------------------------------------------------------------------------------------------------------

HIDDEN = {"H": TABLE["H"], "O": TABLE["O"]._replace(chi=TABLE["O"].chi + 1.0)}
"""What the labels are made with; the training starts from TABLE."""
CONFIG = TrainConfig(epochs=4, batch_size=2, warmup_steps=1, learning_rate=1e-3, threads=1, ema_decay=0.5)


def labelled(table: Mapping[str, ElementParameters] = HIDDEN) -> list[Sample]:
    """Clusters and a cell with energies, forces and stresses of a network and charges."""
    samples = [sample(dimer(k, cell=k == 4), k, field=FIELD if k == 2 else (0, 0, 0)) for k in range(6)]
    teacher = JointCharges(pqeq(parameters=table, tolerance=1e-8), samples)
    out = []
    for one in samples:
        batch = batched(teacher, [one])
        answer = predict(TinyNetwork().double(), batch, create_graph=False, charges=teacher)
        stress = None if answer.stress is None else answer.stress[0]
        out.append(replace(one, energy=float(answer.energy), forces=answer.forces, stress=stress))
    return out


def run(
    folder: Path,
    samples: Sequence[Sample],
    config: TrainConfig = CONFIG,
    *,
    limiter: str = "fene",
    trained: Sequence[str] = ("chi", "K"),
) -> Trainer:
    charges = JointCharges(pqeq(tolerance=1e-8, limiter=limiter), samples, trained=trained, rate=20.0)
    return Trainer(TinyNetwork(), samples[:5], samples[5:], config, folder, progress=False, charges=charges)


def table_of(trainer: Trainer) -> dict[str, ElementParameters]:
    assert trainer.charges is not None
    return trainer.charges.elements.table()


def test_parameters_move_to_what_the_labels_were_made_with(tmp_path: Path) -> None:
    trainer = run(tmp_path, labelled(), replace(CONFIG, epochs=15), trained=["chi"])
    before = trainer.validate()
    result = trainer.fit()
    trainer.load_best()
    after = table_of(trainer)
    assert result.best_score < 0.1 * before["loss"]
    assert trainer.validate()["loss"] == pytest.approx(result.best_score, rel=1e-5)
    # of neutral structures only the difference counts
    apart = after["O"].chi - after["H"].chi - (HIDDEN["O"].chi - HIDDEN["H"].chi)
    assert abs(apart) < 0.3
    assert after["O"]._replace(chi=0.0) == TABLE["O"]._replace(chi=0.0)


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    samples = labelled()
    whole = run(tmp_path / "whole", samples)
    assert whole.fit().reason == "done"
    assert run(tmp_path / "parts", samples).fit(stop_after=2).reason == "stopped"
    torch.rand(7)
    resumed = run(tmp_path / "parts", samples)
    resumed.fit(resume=True)
    for a, b in zip([*whole.parameters, *whole.average], [*resumed.parameters, *resumed.average], strict=True):
        assert torch.equal(a, b)
    assert whole.charges is not None
    assert resumed.charges is not None
    assert torch.equal(whole.charges.answers(), resumed.charges.answers())
    best, again = (read_weights(tmp_path / name / "best.safetensors")[0] for name in ("whole", "parts"))
    assert best.keys() == again.keys() >= {"charges.elements.free.chi", "charges.elements.free.K"}
    assert all(torch.equal(best[key], again[key]) for key in best)
    assert table_of(whole)["O"].chi != TABLE["O"].chi
    with pytest.raises(InputError, match="other parameters were trained"):
        Trainer(TinyNetwork(), samples[:5], samples[5:], CONFIG, tmp_path / "parts", progress=False).fit(resume=True)


def test_parameters_without_a_stable_point_are_stepped_back_from(tmp_path: Path) -> None:
    trainer = run(tmp_path, labelled(TABLE), limiter="none")
    assert trainer.charges is not None
    soft = trainer.charges.elements.free["K"]
    good = soft.detach().clone()
    with torch.no_grad():
        soft -= 5.0  # springs of a few kcal/mol/Å²
    trainer.fit()
    assert 1 <= trainer.state.skipped < 8
    assert float((soft.detach() - good).abs().max()) < 2.5
    assert np.isfinite(trainer.state.best_score)


def test_a_table_that_stays_without_a_stable_point_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "MAX_BAD_STEPS", 3)
    trainer = run(tmp_path, labelled(TABLE), limiter="none")
    with torch.no_grad():
        for name, p, average in zip(trainer.names, trainer.parameters, trainer.average, strict=True):
            if name.endswith("free.K"):
                p -= 5.0
                average -= 5.0
    assert not np.isfinite(trainer.validate()["loss"])
    with pytest.raises(
        VoltPIError, match=r"steps in a row .* or charges.fit.rate .* the charges last said: .*catastrophe"
    ):
        trainer.fit()
