"""Makes reference.json: the run in this folder as MDAnalysis and plain formulae see it. Nothing of VoltPI is used.

The run: i-PI 3.3.1 with input.xml, start.xyz and salt_water_pes.py. This: `python reference.py` with MDAnalysis
installed; its version is in the result.
"""

import gzip
import json
import re
from pathlib import Path

import MDAnalysis as mda
import numpy as np
from MDAnalysis.analysis.dielectric import DielectricConstant
from MDAnalysis.analysis.msd import EinsteinMSD
from MDAnalysis.analysis.rdf import InterRDF
from MDAnalysis.coordinates.memory import MemoryReader
from scipy import constants

HERE = Path(__file__).parent
CHARGE = {"O": -0.82, "H": 0.41, "Na": 1.0, "Cl": -1.0}
MASS = {"O": 15.999, "H": 1.008, "Na": 22.98976928, "Cl": 35.45}
SPACING, TEMPERATURE = 4.0, 400.0  # fs, K

with gzip.open(HERE / "run.pos_0.xyz.gz", "rt") as file:
    lines = file.read().splitlines()
n = int(lines[0])
names = [line.split()[0] for line in lines[2 : n + 2]]
edge = float(re.search(r"CELL\(abcABC\):\s+(\S+)", lines[1])[1])
frames = np.array(
    [[[float(x) for x in line.split()[1:4]] for line in lines[k + 2 : k + 2 + n]] for k in range(0, len(lines), n + 2)]
)
charges, masses = np.array([CHARGE[x] for x in names]), np.array([MASS[x] for x in names])
molecules = [k // 3 for k in range(36)] + [12, 13, 14, 15]


def universe(positions: np.ndarray) -> mda.Universe:
    u = mda.Universe.empty(n, n_residues=16, atom_resindex=molecules, trajectory=False)
    u.add_TopologyAttr("names", names)
    u.add_TopologyAttr("types", names)
    u.add_TopologyAttr("masses", masses)
    u.add_TopologyAttr("charges", charges)
    u.add_TopologyAttr("bonds", [(3 * w, 3 * w + h) for w in range(12) for h in (1, 2)])
    u.load_new(positions.astype(np.float32), format=MemoryReader, dimensions=[edge, edge, edge, 90, 90, 90], dt=0.004)
    return u


out: dict = {"MDAnalysis": mda.__version__, "atoms": names, "edge_A": edge}

u = universe(frames)
out["rdf"] = {"bin_A": 0.1, "range_A": 4.2}
for a, b in (("O", "O"), ("O", "H"), ("Na", "O")):
    rdf = InterRDF(u.select_atoms(f"name {a}"), u.select_atoms(f"name {b}"), nbins=42, range=(0.0, 4.2))
    rdf.run()
    counts = rdf.results.count.copy()
    counts[0] -= len(frames) * (a == b) * sum(x == a for x in names)  # every atom with itself
    # of distinct pairs, where MDAnalysis divides by all
    na, nb = (sum(x == c for x in names) for c in (a, b))
    pairs = na * (nb - (a == b))
    shells = 4 / 3 * np.pi * np.diff(rdf.results.edges**3)
    out["rdf"][f"{a}-{b}"] = (counts / len(frames) * edge**3 / pairs / shells).tolist()

centre = np.einsum("fnk,n->fk", frames, masses) / masses.sum()
still = frames - (centre - centre[0])[:, None]
u = universe(still)
out["msd_A2"] = {}
for name in ("O", "Na"):
    out["msd_A2"][name] = EinsteinMSD(u, select=f"name {name}", fft=False).run().results.timeseries.tolist()

# of the water alone: MDAnalysis refuses free charges
water = universe(frames).select_atoms("name O H")
dielectric = DielectricConstant(water, temperature=TEMPERATURE, make_whole=False).run().results
out["dielectric_of_water"] = {
    "eps_mean": float(dielectric.eps_mean),
    "M_eA": dielectric.M.tolist(),
    "fluct_e2A2": np.asarray(dielectric.fluct).tolist(),
}

# Einstein and Helfand: one by one over origins, a line by numpy.polyfit
moment = np.einsum("n,fnk->fk", charges, still)
lags = np.arange(len(moment) // 10 + 1)
squares = [np.mean([((moment[t + k] - moment[t]) ** 2).sum() for t in range(len(moment) - k)]) for k in lags]
fit = lags >= round(0.025 * (len(moment) - 1))
slope = np.polyfit(lags[fit] * SPACING * 1e-15, np.array(squares)[fit], 1)[0]  # e²Å²/s
volume, kt = (edge * 1e-10) ** 3, constants.k * TEMPERATURE
out["conductivity"] = {
    "dM2_e2A2": squares,
    "einstein_helfand_S_per_m": slope * (constants.e * 1e-10) ** 2 / (6 * volume * kt),
}
current = np.diff(moment, axis=0) / SPACING * 1e5 * constants.e  # A m
correlation = [np.mean([current[t] @ current[t + k] for t in range(len(current) - k)]) for k in lags]
steps = 0.5 * (np.array(correlation[1:]) + np.array(correlation[:-1])) * SPACING * 1e-15
out["conductivity"]["green_kubo_running_S_per_m"] = [0.0, *(np.cumsum(steps) / (3 * volume * kt)).tolist()]

# infrared absorption, classical linear response: n α = β / (3 ε_0 V c) ∫_0^∞ ⟨Ṁ(0)·Ṁ(t)⟩ cos ωt w(t) dt, w of Hann up
# to 300 fs, the differences' response sinc²(ωΔt/2) divided out
moment = frames.transpose(0, 2, 1) @ charges
rate = np.diff(moment, axis=0) / SPACING
lag = np.arange(76)
memory = np.array([np.mean([rate[t] @ rate[t + k] for t in range(len(rate) - k)]) for k in lag])
memory *= 0.5 * (1 + np.cos(np.pi * lag / 75))
out["infrared"] = {"correlations_up_to_fs": 300.0, "absorption_per_cm": {}}
for wavenumber in (500.0, 1500.0, 3700.0):
    omega = 2 * np.pi * constants.c * wavenumber * 100 * 1e-15  # 1/fs
    terms = memory * np.cos(omega * lag * SPACING)
    integral = SPACING * (terms.sum() - 0.5 * terms[0]) / np.sinc(omega * SPACING / (2 * np.pi)) ** 2  # e²Å²/fs
    si = integral * (constants.e * 1e-10) ** 2 * 1e15
    alpha = si / (3 * constants.epsilon_0 * volume * constants.c * kt)
    out["infrared"]["absorption_per_cm"][f"{wavenumber:g}"] = alpha / 100

(HERE / "reference.json").write_text(json.dumps(out) + "\n")
