"""Element parameters of charge equilibration, fitted to labelled dipoles, polarizabilities and Born charges.

The loss is a sum of relative squared errors, Σ_frames |ours − label|² / Σ_frames |label|² for each kind of label times
its weight, and of a weak hold on the table that the fit starts from. Its gradient is exact, through the stationary
point (:mod:`voltpi.potential.electrostatics.implicit`); BFGS follows it downhill. Parameters stay in physical bounds:
η, R and K are x ↦ low (high/low)^σ(x) of free numbers x. χ counts from anywhere where charges are neutral: what holds
its mean is the prior alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from voltpi.potential.electrostatics.explicit import Rows
from voltpi.potential.electrostatics.implicit import DifferentiablePQEq
from voltpi.potential.electrostatics.pqeq import KCAL_PER_EV, LAMBDA, ElementParameters, PQEq
from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError
from voltpi.potential.systems import Systems
from voltpi.potential.training.charge_report import nearest_branch
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.signals import SoftStop
from voltpi.potential.training.storage import read_tensors, write_tensors

__all__ = [
    "BOUNDS",
    "TRAINABLE",
    "ChargeFit",
    "ElementTable",
    "FitResult",
    "Target",
    "TargetBatch",
    "errors_of",
    "joined",
    "label_squares",
    "make_target",
    "make_targets",
    "squared_errors",
    "write_table",
]

TRAINABLE = ("chi", "eta", "R", "K")
BOUNDS = {"eta": (1.0, 200.0), "R": (0.15, 4.0), "K": (2.0, 20000.0)}
"""Between which a fit keeps η (eV), R (Å) and K (kcal/mol/Å²); the published table spans 3.4–30, 0.37–3.0, 5.6–2037."""
CHI_SCALE = 5.0
"""eV; as far as χ moves for the price of a factor e in η, R or K."""
BATCH_ATOMS = 3000
"""Atoms of clusters that are solved for together."""


class ElementTable(nn.Module):
    """χ, η, R, K of the elements of a fit as numbers without bounds; Z stays.

    Parameters
    ----------
    table : symbol -> ElementParameters, where the fit starts and what holds it
    elements : symbols that are fitted; every atom of the data is one of them
    trained : which of :data:`TRAINABLE` change

    Raises InputError for an element that the table does not have, a number outside of :data:`BOUNDS`, and a name that
    cannot be trained.
    """

    def __init__(
        self, table: Mapping[str, ElementParameters], elements: Sequence[str], trained: Sequence[str] = TRAINABLE
    ) -> None:
        super().__init__()
        missing = [symbol for symbol in elements if symbol not in table]
        if missing:
            raise InputError(f"no PQEq parameters for {missing[0]}: add a row to charges.parameters")
        unknown = [name for name in trained if name not in TRAINABLE]
        if unknown or not trained:
            raise InputError(f"charges.fit.train names {unknown or 'nothing'}: choose of {', '.join(TRAINABLE)}")
        self.elements, self.trained = list(elements), [name for name in TRAINABLE if name in trained]
        self.start = {symbol: table[symbol] for symbol in elements}
        place = torch.full((max(map(atomic_numbers.__getitem__, elements)) + 1,), -1, dtype=torch.int64)
        place[[atomic_numbers[symbol] for symbol in elements]] = torch.arange(len(elements))
        self._place = place
        self.free = nn.ParameterDict()
        self._fixed: dict[str, Tensor] = {}
        for name in TRAINABLE:
            given = torch.tensor([getattr(table[symbol], name) for symbol in elements], dtype=torch.float64)
            if name not in self.trained:
                self._fixed[name] = given
                continue
            if name in BOUNDS:
                low, high = BOUNDS[name]
                outside = (given <= low) | (given >= high)
                if bool(outside.any()):
                    k = int(outside.nonzero()[0])
                    raise InputError(
                        f"{name} of {elements[k]} is {float(given[k]):g}, and a fit keeps it between {low:g} and "
                        f"{high:g}: start from another number, or leave {name} out of charges.fit.train"
                    )
                given = torch.logit(torch.log(given / low) / math.log(high / low))
            self.free[name] = nn.Parameter(given)

    def value(self, name: str) -> Tensor:
        """χ, η, R or K of the elements, in the units of the tables."""
        if name in self._fixed:
            return self._fixed[name]
        free = self.free[name]
        if name not in BOUNDS:
            return free
        low, high = BOUNDS[name]
        return low * torch.exp(math.log(high / low) * torch.sigmoid(free))

    def rows(self, numbers: Tensor) -> Rows:
        """Parameters of atoms, differentiable in those that are trained."""
        own = self._place[numbers]
        shell = torch.tensor([bool(self.start[symbol].Z) for symbol in self.elements])
        stiffness = torch.where(shell, self.value("K") / KCAL_PER_EV, 1.0)
        alpha = 0.5 * LAMBDA / self.value("R").square()
        return Rows(self.value("chi")[own], self.value("eta")[own], stiffness[own], alpha[own])

    def table(self) -> dict[str, ElementParameters]:
        """The parameters as they are now."""
        values = {name: self.value(name).tolist() for name in TRAINABLE}
        return {
            symbol: self.start[symbol]._replace(**{name: values[name][k] for name in TRAINABLE})
            for k, symbol in enumerate(self.elements)
        }

    def drift(self) -> Tensor:
        """Σ (Δχ/5 eV)² + (Δ ln η)² + (Δ ln R)² + (Δ ln K)² from the table that the fit started from."""
        total = torch.zeros((), dtype=torch.float64)
        for name in self.trained:
            start = torch.tensor([getattr(self.start[symbol], name) for symbol in self.elements], dtype=torch.float64)
            moved = (self.value(name) - start) / CHI_SCALE if name == "chi" else torch.log(self.value(name) / start)
            total = total + moved.square().sum()
        return total


class Target(NamedTuple):
    """One structure and what is known of its charges.

    systems : prepared (with fragments, where the charges keep them)
    labels : ``dipole`` [3] (e Å), ``polarizability`` [3, 3] (Å³), ``born_charges`` [n, 3, 3] (e); NaN: not known
    quanta : [k, 3], e Å, vectors modulo which the dipole is known; none in a cluster
    """

    systems: Systems
    labels: Mapping[str, Tensor]
    quanta: Tensor


def make_target(model: PQEq, sample: Sample) -> Target:
    """A sample with its labels, if any; the dipole of a charged frame, which depends on the origin, is left out.

    Raises InputError for a frame in a field that not all charges feel: those of a run's first structure are not known.
    """
    if model.response != "all" and bool((sample.systems.field != 0).any()):
        raise InputError(
            f"{sample.path}, frame {sample.frame}: is in a field, but charges.response is {model.response}: set it "
            "to all (in periodic cells with charges.conserve: fragments)"
        )
    labels = {kind: torch.as_tensor(value, dtype=torch.float64) for kind, value in sample.observed.items()}
    if float(sample.systems.net_charge[0]) != 0:
        labels.pop("dipole", None)
    systems = sample.molecules if model.conserve == "fragments" else sample.systems
    return Target(systems, labels, systems.cell[0][systems.pbc[0]])


def make_targets(model: PQEq, samples: Sequence[Sample]) -> list[Target]:
    """Samples that have labels of their charges. Raises InputError as :func:`make_target`."""
    return [target for target in (make_target(model, sample) for sample in samples) if target.labels]


def label_squares(targets: Sequence[Target], weights: Mapping[str, float]) -> dict[str, float]:
    """Σ |label|² of every kind of label that has a weight and is there.

    Raises InputError where none is, and where all labels of a kind are 0.
    """
    there = {kind for target in targets for kind in target.labels}
    kinds = [kind for kind, weight in weights.items() if weight and kind in there]
    if not kinds:
        raise InputError(
            f"charges.fit.targets asks for {', '.join(k for k, w in weights.items() if w)} but no frame has such a "
            "label: name it under data.labels, or change charges.fit.targets"
        )
    squares = {
        kind: sum(float(_known(t.labels[kind]).square().sum()) for t in targets if kind in t.labels) for kind in kinds
    }
    for kind, square in squares.items():
        if not square:
            raise InputError(f"every {kind} label is 0, so that there is nothing to fit to: set its weight to 0")
    return squares


class TargetBatch(NamedTuple):
    """Structures that are solved for together, with the labels of all: NaN where there is none."""

    systems: Systems
    dipole: Tensor
    polarizability: Tensor
    born_charges: Tensor
    quanta: list[Tensor]


def _batches(targets: Sequence[Target]) -> list[TargetBatch]:
    """Clusters side by side, cells one by one (their sums share nothing)."""
    groups: list[list[Target]] = []
    filled = math.inf
    for target in sorted(targets, key=lambda t: bool(t.systems.pbc.any())):
        size = math.inf if bool(target.systems.pbc.any()) else target.systems.n_atoms
        if filled + size > BATCH_ATOMS:
            groups.append([])
            filled = 0
        groups[-1].append(target)
        filled += size
    return [joined(group) for group in groups]


def joined(targets: Sequence[Target]) -> TargetBatch:
    """Structures side by side."""
    shapes = {"dipole": (3,), "polarizability": (3, 3)}
    missing = {kind: torch.full(shape, torch.nan, dtype=torch.float64) for kind, shape in shapes.items()}
    born = [
        t.labels.get("born_charges", torch.full((t.systems.n_atoms, 3, 3), torch.nan, dtype=torch.float64))
        for t in targets
    ]
    stacked = {kind: torch.stack([t.labels.get(kind, none) for t in targets]) for kind, none in missing.items()}
    return TargetBatch(
        Systems.join([t.systems for t in targets]),
        dipole=stacked["dipole"],
        polarizability=stacked["polarizability"],
        born_charges=torch.cat(born),
        quanta=[t.quanta for t in targets],
    )


def squared_errors(answer: DifferentiablePQEq, batch: TargetBatch, kinds: Collection[str]) -> dict[str, Tensor]:
    """Σ (ours − label)² of every structure [b] by kind of label; 0 where there is none."""
    out = {}
    if "dipole" in kinds:
        difference = answer.dipole - batch.dipole
        whole = torch.stack([_quanta(d, lattice) for d, lattice in zip(difference, batch.quanta, strict=True)])
        out["dipole"] = _known(difference - whole).square().sum(1)
    if "polarizability" in kinds or "born_charges" in kinds:
        alpha, born = answer.responses(born_charges="born_charges" in kinds)
        if "polarizability" in kinds:
            out["polarizability"] = _known(alpha - batch.polarizability).square().sum((1, 2))
        if born is not None:
            square = _known(born - batch.born_charges).square().sum((1, 2))
            out["born_charges"] = torch.zeros_like(alpha[:, 0, 0]).index_add(0, batch.systems.batch, square)
    return out


@dataclass(frozen=True)
class FitResult:
    """Where a fit ended: the loss, the parameters, how many steps were accepted and gradients computed, and why."""

    loss: float
    table: dict[str, ElementParameters]
    steps: int
    gradients: int
    reason: str


class ChargeFit:
    """Fits element parameters of ``model`` to ``targets``.

    Parameters
    ----------
    model : settings and the table that the fit starts from
    targets : structures with labels
    weights : ``dipole``, ``polarizability``, ``born_charges`` -> weight of the relative squared error
    trained : which parameters change, of :data:`TRAINABLE`
    prior : weight of :meth:`ElementTable.drift`
    folder : where ``charges.csv`` and what is needed to go on are written after every accepted step, or None

    Raises InputError where no target has a label with a weight.
    """

    def __init__(
        self,
        model: PQEq,
        targets: Sequence[Target],
        weights: Mapping[str, float],
        *,
        trained: Sequence[str] = TRAINABLE,
        prior: float = 1e-4,
        folder: str | Path | None = None,
    ) -> None:
        self._norms = label_squares(targets, weights)
        self.weights = {kind: weights[kind] for kind in self._norms}
        counted = [t for t in targets if t.labels.keys() & self.weights.keys()]
        numbers = sorted({z for t in counted for z in t.systems.numbers.tolist()})
        self.elements = ElementTable(model.parameters, [chemical_symbols[z] for z in numbers], trained)
        self.model, self.prior = model, prior
        self.folder = None if folder is None else Path(folder)
        self._batches = _batches(counted)
        self._starts: list[tuple[Tensor, Tensor] | None] = [None] * len(self._batches)

    def __call__(self, *, gradient: bool = True) -> tuple[float, dict[str, float]]:
        """The loss, and relative errors (root of the relative squared error) by kind; gradients are left in place."""
        self.elements.zero_grad()
        squares = dict.fromkeys(self._norms, 0.0)
        held = self.prior * self.elements.drift()
        total = float(held.detach())
        if gradient:
            held.backward()
        for k, batch in enumerate(self._batches):
            # the graph of one batch at a time
            errors = self._errors(k, batch)
            loss = torch.stack([self.weights[kind] * e / self._norms[kind] for kind, e in errors.items()]).sum()
            if gradient:
                loss.backward()
            total += float(loss.detach())
            for kind, error in errors.items():
                squares[kind] += float(error.detach())
        return total, {kind: math.sqrt(square / self._norms[kind]) for kind, square in squares.items()}

    def _errors(self, k: int, batch: TargetBatch) -> dict[str, Tensor]:
        """Squared errors of one batch by kind."""
        rows = self.elements.rows(batch.systems.numbers)
        table = {**self.model.parameters, **self.elements.table()}
        answer = DifferentiablePQEq(self.model, batch.systems, table, rows, self._starts[k])
        y = answer.y.detach()
        self._starts[k] = (y[:, 0], y[:, 1:])
        return {kind: squares.sum() for kind, squares in squared_errors(answer, batch, self._norms).items()}

    # -- descent -------------------------------------------------------------------------------------------------

    def fit(
        self,
        *,
        steps: int = 200,
        tolerance: float = 1e-4,
        report: Callable[[int, float, Mapping[str, float]], None] | None = None,
    ) -> FitResult:
        """BFGS until five steps together gain less than ``tolerance`` of the loss, or ``steps`` are done.

        Parameters without a stable stationary point are stepped back from. Ctrl-C ends after the running gradient. A
        ``folder`` with an earlier state is taken up. ``report`` is given step, loss and errors after every step.

        Raises NoStablePointError and NotConvergedError where the table at the start has no stationary point.
        """
        parameters = list(self.elements.free.values())
        memory = self._load()
        x = nn.utils.parameters_to_vector(parameters).detach()
        n = len(x)
        inverse = torch.eye(n, dtype=x.dtype) if memory is None else memory["inverse"]
        done = 0 if memory is None else int(memory["steps"])
        gradients = 1
        loss, errors = self()
        gradient = nn.utils.parameters_to_vector([_gradient(p) for p in parameters])
        history = [loss] if memory is None else memory["history"].tolist()
        reason = "steps"
        with SoftStop() as stop:
            while done < steps:
                if stop.asked:
                    reason = "interrupted"
                    break
                if len(history) > 5 and history[-6] - history[-1] < tolerance * history[-1]:
                    reason = "converged"
                    break
                direction = -inverse @ gradient
                if float(direction @ gradient) >= 0:
                    inverse = torch.eye(n, dtype=x.dtype)
                    direction = -gradient
                direction = direction * min(1.0, 0.5 / float(direction.abs().max()))
                slope = float(direction @ gradient)
                length, found = 1.0, False
                while length > 1e-6 and not stop.asked:
                    nn.utils.vector_to_parameters(x + length * direction, parameters)
                    gradients += 1
                    try:
                        trial, errors = self()
                    except (NoStablePointError, NotConvergedError):
                        trial = math.inf
                    if trial <= loss + 1e-4 * length * slope:
                        found = True
                        break
                    length *= (
                        0.5
                        if not math.isfinite(trial)
                        else max(0.1, min(0.5, -0.5 * slope * length / (trial - loss - slope * length)))
                    )
                if not found:
                    nn.utils.vector_to_parameters(x, parameters)
                    reason = "interrupted" if stop.asked else "converged"
                    break
                new = nn.utils.parameters_to_vector([_gradient(p) for p in parameters])
                inverse = _updated(inverse, length * direction, new - gradient, first=done == 0)
                x, loss, gradient = x + length * direction, trial, new
                done += 1
                history.append(loss)
                self._save({"inverse": inverse, "steps": torch.tensor(done), "history": torch.tensor(history)})
                if report is not None:
                    report(done, loss, errors)
        return FitResult(loss, self.elements.table(), done, gradients, reason)

    def _save(self, memory: Mapping[str, Tensor]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.folder / "charges.safetensors", {**self.elements.state_dict(), **memory}, self._identity())
        write_table(self.folder / "charges.csv", self.elements.table())

    def _load(self) -> dict[str, Tensor] | None:
        """Parameters of an earlier call, put in place, and what BFGS knew. Raises InputError for another fit's."""
        if self.folder is None or not (self.folder / "charges.safetensors").exists():
            return None
        tensors, header = read_tensors(self.folder / "charges.safetensors")
        identity = self._identity()
        changed = [key for key, value in identity.items() if header.get(key) != value]
        if changed:
            raise InputError(
                f"{self.folder} holds a fit of charges that was begun with other {changed[0]}: give another output "
                f"folder, or restore {changed[0]} to go on"
            )
        names = self.elements.state_dict().keys()
        self.elements.load_state_dict({name: tensors[name] for name in names})
        return {name: value for name, value in tensors.items() if name not in names}

    def _identity(self) -> dict[str, object]:
        """What must not change for a fit to go on."""
        config = {**self.model.config, "parameters": {k: list(v) for k, v in self.elements.start.items()}}
        return {
            "charges": config,
            "charges.fit.train": self.elements.trained,
            "charges.fit.targets": self.weights,
            "charges.fit.prior": self.prior,
            "labels": [[kind, norm] for kind, norm in self._norms.items()],
        }


def errors_of(model: PQEq, targets: Sequence[Target], weights: Mapping[str, float]) -> dict[str, float]:
    """Relative errors of a model as it is, by kind of label that has a weight and is there."""
    if not any(t.labels.keys() & weights.keys() for t in targets):
        return {}
    return ChargeFit(model, targets, weights)(gradient=False)[1]


def _known(values: Tensor) -> Tensor:
    """Values with 0 where a label is missing."""
    return torch.where(values.isnan(), 0.0, values)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _updated(inverse: Tensor, step: Tensor, change: Tensor, *, first: bool) -> Tensor:
    """BFGS update of the inverse Hessian; left out where the curvature along the step is not positive."""
    along = float(step @ change)
    if along <= 1e-10 * float(step.norm() * change.norm()):
        return inverse
    if first:
        inverse = inverse * (along / float(change @ change))
    left = torch.eye(len(step), dtype=step.dtype) - torch.outer(step, change) / along
    return left @ inverse @ left.T + torch.outer(step, step) / along


def _quanta(difference: Tensor, lattice: Tensor) -> Tensor:
    """What to take off a difference of dipoles [3] to be on the nearest branch, without a gradient."""
    if not len(lattice):
        return torch.zeros_like(difference)
    d = torch.nan_to_num(difference.detach())
    return d - torch.as_tensor(nearest_branch(d.numpy(), lattice.numpy(), np.ones(len(lattice), dtype=bool)))


def write_table(path: Path, table: Mapping[str, ElementParameters]) -> None:
    """A CSV of parameters that ``charges.parameters`` takes."""
    rows = [",".join([symbol, *(f"{value:.8g}" for value in row)]) for symbol, row in table.items()]
    partial = path.with_suffix(".tmp")
    partial.write_text("\n".join(["symbol,chi,eta,Z,R,K", *rows, ""]), encoding="utf-8")
    partial.replace(path)
