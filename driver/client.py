"""A driver for a running i-PI: connect, serve, survive, leave.

Every way out says one sentence and returns an exit status: 0 after i-PI's EXIT, 1 after anything else.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from voltpi.driver.protocol import Array, Closed, ProtocolError, ResultLike, Structures, Wire, real_structures
from voltpi.potential.errors import InputError, VoltPIError

__all__ = ["EvaluatorLike", "TcpAddress", "UnixAddress", "connect", "evaluate_batch", "serve"]

DEFAULT_PREFIX = "/tmp/ipi_"
# struct sockaddr_un holds 108 bytes with the closing zero
LONGEST_UNIX_PATH = 107
_REPORT_SECONDS = 60.0


class EvaluatorLike(Protocol):
    """What a driver needs of an evaluator; atomic units throughout (see ``voltpi.driver.evaluator.Evaluator``).

    One to which it matters how many structures there are, because it counts steps or averages over beads, says so with
    a true ``counts_structures``.
    """

    @property
    def n_atoms(self) -> int: ...

    def evaluate(self, cells: Array, positions: Array, replicas: list[int] | None = None) -> Sequence[ResultLike]: ...


@dataclass(frozen=True)
class UnixAddress:
    """A unix socket: i-PI's ``<address>`` and the prefix it was started with (``i-pi -S PREFIX``).

    Raises InputError when the path is longer than the system allows.
    """

    name: str
    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        check_unix_path(self.path)

    @property
    def path(self) -> str:
        return self.prefix + self.name

    def open(self, seconds: float) -> socket.socket:
        """One attempt to connect, within so many seconds. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock

    def __str__(self) -> str:
        return f"unix socket {self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A TCP socket: i-PI's ``<address>`` and ``<port>``."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"port {self.port} is outside 1…65535: give the <port> of i-PI's <ffsocket>")

    def open(self, seconds: float) -> socket.socket:
        """One attempt to connect, within so many seconds. Raises OSError, InputError when the host has no address."""
        try:
            sock = socket.create_connection((self.host, self.port), timeout=seconds)
        except socket.gaierror as error:
            raise InputError(
                f"host {self.host} has no address ({error.strerror}): give the host that i-PI runs on"
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


Address = UnixAddress | TcpAddress


def check_unix_path(path: str) -> None:
    """Raises InputError when a unix socket's path is longer than the system allows."""
    if (length := len(path.encode())) > LONGEST_UNIX_PATH:
        raise InputError(
            f"the unix socket's path {path} has {length} bytes and the system allows {LONGEST_UNIX_PATH}: "
            "use a shorter prefix or a shorter <address>"
        )


def connect(address: Address, wait: float = 60.0) -> socket.socket:
    """Connects, trying again until ``wait`` seconds have passed. Raises VoltPIError (nobody listens), InputError."""
    end = time.monotonic() + wait
    pause = 0.05
    while True:
        try:
            return address.open(max(0.1, end - time.monotonic()))
        except OSError as error:
            left = end - time.monotonic()
            if left <= 0:
                raise VoltPIError(
                    f"nobody listens at {address} after {wait:g} s ({error.strerror or error}): start i-PI first with "
                    "the same address and socket prefix, or wait longer with --wait SECONDS"
                ) from error
        time.sleep(min(pause, left))
        pause = min(2 * pause, 1.0)


def evaluate_batch(evaluator: EvaluatorLike, structures: Structures) -> list[ResultLike]:
    """Evaluates a batch, its padding only once (unless structures are counted); one result for every structure.

    Replica numbers are places in the batch. Over sockets these follow i-PI's queue and not always the same bead, which
    is enough for their use: the image of an atom nearest to a neighbouring bead.

    Raises VoltPIError for another number of atoms than the evaluator's and for positions or cells that are not finite.
    """
    cells, positions = structures
    n_atoms = positions.shape[1]
    if n_atoms != evaluator.n_atoms:
        raise VoltPIError(
            f"i-PI moves {n_atoms} atoms but the start structure of this driver has {evaluator.n_atoms}: "
            "give the driver the file that the XML's <initialize><file> names"
        )
    if not (np.isfinite(positions).all() and np.isfinite(cells).all()):
        raise VoltPIError(
            "i-PI sent positions or a cell that are not finite: the run has exploded before this step; "
            "start again from an earlier checkpoint with a shorter <timestep>"
        )
    real = len(positions) if _counts(evaluator) else real_structures(structures)
    results = list(evaluator.evaluate(cells[:real], positions[:real], list(range(real))))
    return results + results[-1:] * (len(positions) - real)


def _counts(evaluator: EvaluatorLike) -> bool:
    return bool(getattr(evaluator, "counts_structures", False))


def refuse_filled_batches(evaluator: EvaluatorLike, batch_size: int) -> None:
    """Raises VoltPIError for batches over a socket, which may hold copies, where the evaluator counts structures."""
    if batch_size > 1 and _counts(evaluator):
        raise VoltPIError(
            f"i-PI sends batches of {batch_size}, which it fills up with copies over sockets, but potentials that "
            "change with time and charges that beads share need each structure once: use <batch_size>1</batch_size>, "
            "or <ffdirect>"
        )


def _print(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass
class _Log:
    """Counts evaluations and says every minute how it goes."""

    report: Callable[[str], None]
    evaluations: int = 0
    structures: int = 0
    seconds: float = 0.0
    _said: float = field(default_factory=time.monotonic)

    def add(self, structures: int, seconds: float) -> None:
        self.evaluations += 1
        self.structures += structures
        self.seconds += seconds
        if self.evaluations == 1:
            self.report(f"first evaluation took {seconds:.3f} s")
        elif time.monotonic() - self._said > _REPORT_SECONDS:
            self._said = time.monotonic()
            self.report(self.summary())

    def summary(self) -> str:
        mean = 1e3 * self.seconds / max(1, self.evaluations)
        batches = f" of {self.structures} structures" if self.structures != self.evaluations else ""
        return f"{self.evaluations} evaluations{batches} in {self.seconds:.2f} s, {mean:.3g} ms each"


def serve(
    evaluator: EvaluatorLike,
    address: Address,
    *,
    wait: float = 60.0,
    reconnects: int = 0,
    use_shared_memory: bool = False,
    with_parameters: Callable[[dict[str, str]], EvaluatorLike] | None = None,
    report: Callable[[str], None] = _print,
) -> int:
    """Serves one i-PI until it says EXIT; returns the exit status.

    Parameters:
        evaluator: gives energies, forces and virials in atomic units.
        address: where i-PI listens.
        wait: seconds to wait for i-PI to listen.
        reconnects: how often to connect again after an evaluation failed (i-PI hands the same work out again).
        use_shared_memory: for ``<ffsocket mode='shm'>``.
        with_parameters: takes the ``<parameters>`` of the ``<ffsocket>`` and gives the evaluator they describe; without
            it an ``<ffsocket>`` may have none.
        report: takes one sentence at a time (default: stderr).

    Returns 0 after i-PI's EXIT; 1 when nobody listens, i-PI goes away, an evaluation fails or is not finite, or after
    Ctrl-C.
    Raises InputError for an address that cannot be, and for reconnects where the evaluator counts structures, be it the
    one that ``<parameters>`` describe.
    """
    _refuse_reconnects(evaluator, reconnects)
    if use_shared_memory and not isinstance(address, UnixAddress):
        raise InputError("shared memory needs a unix socket on the same machine: give --unix NAME with --shm")
    log = _Log(report)
    try:
        for attempt in range(reconnects + 1):
            try:
                wire = Wire(connect(address, wait), use_shared_memory=use_shared_memory)
                return _serve_once(evaluator, wire, log, address, with_parameters, reconnects)
            except _EvaluationFailed as failure:
                report(f"evaluation {log.evaluations + 1} failed: {failure}")
                if attempt < reconnects:
                    report(f"connecting to {address} again ({attempt + 1} of {reconnects})")
        return 1
    except InputError:
        raise
    except VoltPIError as error:
        report(str(error))
        return 1
    except KeyboardInterrupt:
        report(f"interrupted after {log.summary()}")
        return 1


def _refuse_reconnects(evaluator: EvaluatorLike, reconnects: int) -> None:
    if reconnects and _counts(evaluator):
        raise InputError(
            "with potentials that change with time, or a charge that beads share, a driver that connects again would "
            "have lost count; leave --reconnects at 0 and continue from RESTART"
        )


class _EvaluationFailed(VoltPIError):
    """Carries the sentence of whatever went wrong in an evaluation."""


def _serve_once(
    evaluator: EvaluatorLike,
    wire: Wire,
    log: _Log,
    address: Address,
    with_parameters: Callable[[dict[str, str]], EvaluatorLike] | None,
    reconnects: int,
) -> int:
    log.report(f"connected to {address}")
    known: dict[str, str] = {}
    try:
        while (structures := wire.receive()) is not None:
            if wire.parameters != known:
                if with_parameters is None:
                    raise InputError(f"i-PI sends <parameters> {wire.parameters}, which this driver does not take")
                evaluator, known = with_parameters(wire.parameters), dict(wire.parameters)
                _refuse_reconnects(evaluator, reconnects)
            refuse_filled_batches(evaluator, wire.batch_size)
            began = time.monotonic()
            if not _answer(evaluator, wire, structures):
                break
            log.add(real_structures(structures), time.monotonic() - began)
        log.report(f"i-PI said goodbye after {log.summary()}")
        return 0
    except Closed as closed:
        if wire.said_exit():
            log.report(
                f"i-PI said goodbye during an evaluation, after {log.summary()}; if it goes on with another driver, "
                "its <timeout> is shorter than one evaluation"
            )
            return 0
        raise VoltPIError(
            f"{closed} at {address} without a goodbye, after {log.summary()}: look at the end of i-PI's log, "
            "and continue from RESTART"
        ) from closed
    finally:
        wire.close()


def _answer(evaluator: EvaluatorLike, wire: Wire, structures: Structures) -> bool:
    try:
        return wire.reply(evaluate_batch(evaluator, structures))
    except (Closed, ProtocolError):
        raise
    except VoltPIError as error:
        raise _EvaluationFailed(describe(error)) from error
    except Exception as error:
        traceback.print_exc()  # not foreseen, so whoever mends it needs to know where
        raise _EvaluationFailed(describe(error)) from error


def describe(error: BaseException) -> str:
    """One line for any exception: ours say it themselves, others get their kind in front."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VoltPIError) and text else f"{type(error).__name__}: {text}"
