"""i-PI's wire protocol, as bytes: plain, batched and shared memory. No evaluation here.

i-PI (the server) sends 12-byte headers: ``STATUS``, ``INIT``, ``POSDATA``, ``GETFORCE``, ``EXIT``; all numbers are
little-endian float64 and int32, all quantities in atomic units. With ``batch_size:N`` in the text of ``INIT`` every
``POSDATA`` brings N structures. A cell travels as i-PI's matrix h (lattice vectors are columns) in row-major order.

Units: bohr, hartree, hartree/bohr.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from multiprocessing import resource_tracker, shared_memory
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from voltpi.potential.errors import VoltPIError

__all__ = [
    "Closed",
    "ProtocolError",
    "ResultLike",
    "Structures",
    "Wire",
    "check_result",
    "encode_extras",
    "real_structures",
]

Array = NDArray[np.float64]

HEADER_LENGTH = 12
# i-PI sends the header that follows POSDATA together with it, so this is only ever waited for on a slow network
READ_AHEAD_SECONDS = 0.05
_MOST_ATOMS = 10_000_000
_LONG = 100  # numbers or rows, from which a list is worth a faster way to text
_SEGMENTS = ("pos", "h", "ih", "pot", "force", "vir")


class Closed(VoltPIError):
    """The server closed the connection without saying EXIT."""


class ProtocolError(VoltPIError):
    """What arrived is not i-PI's protocol."""


class ResultLike(Protocol):
    """Energy (hartree), forces [n,3] (hartree/bohr), virial [3,3] (hartree, −dE/dstrain), extras (a JSON object)."""

    @property
    def energy(self) -> float: ...
    @property
    def forces(self) -> Array: ...
    @property
    def virial(self) -> Array: ...
    @property
    def extras(self) -> dict[str, Any]: ...


class Structures(NamedTuple):
    """A batch as i-PI sent it, in bohr: cells [b,3,3] (i-PI's h, lattice vectors are columns), positions [b,n,3]."""

    cells: Array
    positions: Array


def header(name: str) -> bytes:
    """A header as it goes over the wire: 12 bytes, padded with blanks."""
    return name.upper().ljust(HEADER_LENGTH).encode("ascii")


_STATUS, _INIT, _POSDATA, _GETFORCE, _EXIT = map(header, ("status", "init", "posdata", "getforce", "exit"))
_NEEDINIT, _READY, _HAVEDATA, _FORCEREADY = map(header, ("needinit", "ready", "havedata", "forceready"))


def real_structures(structures: Structures) -> int:
    """How many structures come before the padding: i-PI fills a short batch with copies of its last structure."""
    cells, positions = structures
    n = len(positions)
    while n > 1 and np.array_equal(positions[n - 1], positions[n - 2]) and np.array_equal(cells[n - 1], cells[n - 2]):
        n -= 1
    return n


def encode_extras(extras: dict[str, Any]) -> bytes:
    """The extras string: one JSON object in ASCII, so that its length in bytes is its length in characters.

    Long lists of numbers, such as charges, are written to 14 decimals: in the units of extras (e, bohr) that is all
    they have, and JSON's own shortest form takes both sides 2.4 times as long (10 000 charges: 5.8 and 2.4 ms).

    Raises VoltPIError for the key ``raw``, which i-PI keeps for itself, and for values JSON cannot hold (NaN included).
    """
    if "raw" in extras:
        raise VoltPIError("extras may not have the key 'raw', which i-PI keeps for itself")
    try:
        return ("{" + ",".join(f"{json.dumps(key)}:{_json(value)}" for key, value in extras.items()) + "}").encode(
            "ascii"
        )
    except (TypeError, ValueError) as error:
        raise VoltPIError(f"extras cannot be written as JSON: {error}") from error


def _json(value: Any) -> str:
    """JSON of one value. Raises TypeError, ValueError for what JSON cannot hold."""
    if isinstance(value, list) and max(len(value), *(len(v) for v in value[:1] if isinstance(v, list)), 0) >= _LONG:
        array = np.array(value)  # ValueError for rows of different lengths
        if array.dtype == np.float64 and array.ndim <= 2:
            if not np.isfinite(array).all():
                raise ValueError("Out of range float values are not JSON compliant")
            row = "[" + ",".join(["%.14f"] * array.shape[-1]) + "]"
            form = row if array.ndim == 1 else "[" + ",".join([row] * len(array)) + "]"
            return form % tuple(array.ravel().tolist())
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def check_result(result: ResultLike, n_atoms: int) -> None:
    """Raises VoltPIError unless energy, forces [n,3] and virial [3,3] are finite and of the right shape.

    i-PI takes NaN for an answer: it would end with status 0 and a RESTART full of NaN.
    """
    for name, value, shape in (
        ("energy", result.energy, ()),
        ("forces", result.forces, (n_atoms, 3)),
        ("virial", result.virial, (3, 3)),
    ):
        array = np.asarray(value)
        if array.shape != shape:
            raise VoltPIError(f"the {name} came out with shape {list(array.shape)} instead of {list(shape)}")
        if not np.isfinite(array).all():
            where = np.argwhere(~np.isfinite(array))
            atom = f" of atom {where[0][0]} (from 0)" if name == "forces" else ""
            raise VoltPIError(f"the {name}{atom} came out as {array[tuple(where[0])]}: nothing was sent to i-PI")


class Wire:
    """One connection, seen from the driver: ``receive`` a batch, evaluate it, ``reply``.

    After POSDATA the next header is read before ``receive`` returns: a driver that dies while evaluating then leaves an
    empty receive queue, which i-PI sees as an ordinary end of file and hands the work to another driver. Unread bytes
    would reset the connection, and that ends i-PI's polling thread for good.

    Parameters: a connected stream socket; whether the numbers travel through i-PI's shared memory (``mode='shm'``).
    """

    def __init__(self, sock: socket.socket, *, use_shared_memory: bool = False) -> None:
        self.batch_size = 1
        self.parameters: dict[str, str] = {}  # of the <ffsocket>, as i-PI sends them
        self.initialized = False
        self._socket = sock
        self._ahead = bytearray()
        self._segments = _Segments() if use_shared_memory else None
        self._pending: Structures | None = None
        sock.settimeout(None)

    def receive(self) -> Structures | None:
        """The next batch, or None when i-PI says EXIT. Raises Closed, ProtocolError."""
        while True:
            command = bytes(self._read(HEADER_LENGTH))
            if command == _STATUS:
                self._send(_READY if self.initialized else _NEEDINIT)
            elif command == _INIT:
                self._read_init()
            elif command == _POSDATA:
                self._pending = self._read_shared() if self._segments else self._read_structures()
                self._look_ahead()
                return self._pending
            elif command == _EXIT:
                return None
            else:
                raise _out_of_step(command)

    def reply(self, results: Sequence[ResultLike]) -> bool:
        """Answers the batch that ``receive`` gave, with as many results; False when i-PI says EXIT instead of asking.

        Raises VoltPIError when a result is not finite or has a wrong shape (nothing is sent), Closed, ProtocolError.
        """
        if self._pending is None or len(results) != len(self._pending.positions):
            raise ValueError("reply() needs one result for every structure that receive() gave")
        n_atoms = self._pending.positions.shape[1]
        for result in results:
            check_result(result, n_atoms)
        extras = [encode_extras(result.extras) for result in results]
        while (command := bytes(self._read(HEADER_LENGTH))) != _GETFORCE:
            if command == _EXIT:
                return False
            if command != _STATUS:
                raise _out_of_step(command)
            self._send(_HAVEDATA)
        energies = np.array([result.energy for result in results], dtype=np.float64)
        forces = np.array([result.forces for result in results], dtype=np.float64)
        virials = np.array([result.virial for result in results], dtype=np.float64)
        parts = [_FORCEREADY]
        if self._segments:
            self._segments.write(energies, forces, virials)
        else:
            parts += [energies.tobytes(), struct.pack("<i", n_atoms), forces.tobytes(), virials.tobytes()]
        parts += [struct.pack("<i", len(text)) + text for text in extras]
        self._pending = None
        self._send(b"".join(parts))
        return True

    def said_exit(self) -> bool:
        """Whether EXIT is among what i-PI sent last (asked after a failed send; does not wait)."""
        try:
            self._socket.settimeout(0.0)
            while chunk := self._socket.recv(65536):
                self._ahead += chunk
        except OSError:
            pass
        return bytes(self._ahead).endswith(_EXIT)

    def close(self) -> None:
        """Closes the connection with an empty receive queue (see above)."""
        self.said_exit()
        self._socket.close()
        if self._segments:
            self._segments.close()

    # -- reading

    def _read_init(self) -> None:
        _replica, length = struct.unpack("<ii", self._read(8))
        if not 0 <= length < 1 << 24:
            raise _out_of_step(b"INIT")
        pairs = (token.partition(":") for token in self._read(length).decode("utf-8", errors="replace").split(","))
        self.parameters = {key.strip(): value.strip() for key, _, value in pairs if value.strip()}
        batch_size = self.parameters.pop("batch_size", "1")
        self.batch_size = max(1, int(batch_size)) if batch_size.isdigit() else 1
        self.initialized = True

    def _read_structures(self) -> Structures:
        batch = self.batch_size
        # a single structure sends the atom count after its cell, a batch before the cells
        if batch > 1:
            n_atoms = self._read_count()
        cells = self._read_floats(batch * 18).reshape(batch, 2, 3, 3)[:, 0]
        if batch == 1:
            n_atoms = self._read_count()
        return Structures(cells.copy(), self._read_floats(batch * n_atoms * 3).reshape(batch, n_atoms, 3))

    def _read_shared(self) -> Structures:
        assert self._segments is not None
        n_atoms = self._read_count()
        if not self._segments.attached:
            names = {kind: self._read(self._read_count()).decode("utf-8") for kind in _SEGMENTS}
            self._segments.attach(names, self.batch_size, n_atoms)
        return self._segments.read()

    def _read_count(self) -> int:
        (count,) = struct.unpack("<i", self._read(4))
        if not 0 < count <= _MOST_ATOMS:
            raise ProtocolError(
                f"i-PI announced {count} atoms, so client and server disagree about the protocol: "
                "use --shm exactly where the XML says mode='shm'"
            )
        return int(count)

    def _read_floats(self, count: int) -> Array:
        return np.frombuffer(self._read(8 * count), dtype=np.float64)

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        done = min(count, len(self._ahead))
        view[:done] = self._ahead[:done]
        del self._ahead[:done]
        try:
            while done < count:
                got = self._socket.recv_into(view[done:])
                if got == 0:
                    raise Closed("i-PI closed the connection")
                done += got
        except OSError as error:
            raise Closed(f"i-PI closed the connection ({error.strerror or error})") from error
        return data

    def _look_ahead(self) -> None:
        self._socket.settimeout(READ_AHEAD_SECONDS)
        try:
            while len(self._ahead) < HEADER_LENGTH:
                chunk = self._socket.recv(HEADER_LENGTH - len(self._ahead))
                if not chunk:
                    break  # the next read says so
                self._ahead += chunk
        except TimeoutError:
            pass
        except OSError as error:
            raise Closed(f"i-PI closed the connection ({error.strerror or error})") from error
        finally:
            self._socket.settimeout(None)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Closed(f"i-PI closed the connection ({error.strerror or error})") from error


class _Segments:
    """The six shared-memory segments i-PI owns for one client; this side only attaches."""

    def __init__(self) -> None:
        self._handles: dict[str, shared_memory.SharedMemory] = {}
        self._views: dict[str, Array] = {}

    @property
    def attached(self) -> bool:
        return bool(self._views)

    def attach(self, names: dict[str, str], batch: int, n_atoms: int) -> None:
        shapes = {"pos": (batch, n_atoms, 3), "force": (batch, n_atoms, 3), "pot": (batch,)}
        for kind in _SEGMENTS:
            try:
                handle = shared_memory.SharedMemory(name=names[kind])
            except OSError as error:
                raise ProtocolError(
                    f"i-PI's shared memory {names[kind]} cannot be opened ({error.strerror}): "
                    "run the driver on i-PI's machine, or use mode='unix' without --shm"
                ) from error
            # i-PI removes the segment; without this our interpreter would do so too when it ends (Python < 3.13)
            resource_tracker.unregister(handle._name, "shared_memory")  # type: ignore[attr-defined]
            self._handles[kind] = handle
            self._views[kind] = np.ndarray(shapes.get(kind, (batch, 3, 3)), dtype=np.float64, buffer=handle.buf)

    def read(self) -> Structures:
        return Structures(self._views["h"].copy(), self._views["pos"].copy())

    def write(self, energies: Array, forces: Array, virials: Array) -> None:
        self._views["pot"][:], self._views["force"][:], self._views["vir"][:] = energies, forces, virials

    def close(self) -> None:
        self._views.clear()
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


def _out_of_step(command: bytes) -> ProtocolError:
    return ProtocolError(
        f"i-PI sent {command!r}, which no i-PI header is: the server is not i-PI, or client and server "
        "disagree about the protocol (use --shm exactly where the XML says mode='shm')"
    )
