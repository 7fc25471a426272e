"""The command line: parses, calls, prints.

Exit status: 0 done, 1 failed while running, 2 bad input; errors are one line on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from voltpi.potential.errors import InputError, VoltPIError

# torch, ASE and i-PI are imported inside the commands: `voltpi --help` answers at once

__all__ = ["app", "main"]

app = typer.Typer(
    name="voltpi",
    help="Molecular dynamics under electric fields and electrode voltages, driven by i-PI.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SettingsOption = Annotated[Path | None, typer.Option("--settings", metavar="FILE", help="Settings (YAML).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as field=[0,0,0.1]; repeatable."),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option("--template", metavar="FILE", help="Start structure (default: start.xyz beside the settings)."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"voltpi {version('voltpi')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Molecular dynamics under electric fields and electrode voltages, driven by i-PI."""


@app.command("new")
def new(
    use: Annotated[str | None, typer.Argument(metavar="USE", help="What to do; leave out for the list.")] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="New folder (default: the name of the use).")
    ] = None,
) -> int:
    """Copy ready inputs (i-PI XML, settings, start structure) to a new folder."""
    from voltpi.driver.uses import copy_use, describe_uses

    if use is None:
        for name, line in describe_uses().items():
            print(f"{name:24} {line}".rstrip())
        return 0
    target = copy_use(use, folder or Path(use))
    print(f"{target} is ready: `cd {target}`, look at settings.yaml, and `voltpi run input.xml`")
    return 0


@app.command("models")
def models() -> int:
    """List the models that ship, with what they were trained on."""
    from voltpi.driver.report import print_models

    print_models()
    return 0


@app.command("import-reaxnet")
def import_reaxnet(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="params.pickle, model_config.yaml and mapping.yaml of a checkpoint.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The model file (default: DIR's name.safetensors).")
    ] = None,
    charges: Annotated[
        str, typer.Option("--charges", help="taper (as published), pqeq (whole Coulomb sum, stationary) or none.")
    ] = "taper",
    dispersion: Annotated[str, typer.Option("--dispersion", help="d3 (as published) or none.")] = "d3",
    inference_sign: Annotated[
        bool, typer.Option("--inference-sign", help="Edge vectors of the inference notebook, not of the training.")
    ] = False,
) -> int:
    """Turn a published ReaxNet checkpoint into a model file."""
    target = out or Path(f"{folder.expanduser().resolve().name}.safetensors")
    if target.exists():
        raise InputError(f"{target} exists already; remove it, or give another file with --out")
    from voltpi.potential.checkpoints import save_potential
    from voltpi.potential.reaxnet import import_reaxnet as import_

    potential, card = import_(folder, charges=charges, dispersion=dispersion, inference_sign=inference_sign)
    save_potential(target, potential, card)
    print(f"{target} is ready: {card['summary']}, for {', '.join(card['elements'])}; use it as model: {target}")
    return 0


@app.command("export")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model's name or a model file.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The file to write, such as water.pt.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="metatomic.")] = "metatomic",
    assignments: SetOption = None,
) -> int:
    """Write a model as one file that LAMMPS, ASE and i-PI run through metatomic, at zero field."""
    from voltpi.driver.export import export_model

    print(export_model(model, to, output, assignments or ()))
    return 0


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(metavar="INPUT.xml|S.yaml", help="An i-PI input or a settings file.")],
    template: TemplateOption = None,
) -> int:
    """Say everything that can be known to be wrong before a run, with the fix."""
    from voltpi.driver.check import check as findings_of

    problems = 0
    for finding in findings_of(file, template):
        problems += not finding.ok
        if finding.ok:
            print(f"ok: {finding.sentence}", flush=True)
        else:
            _complain(finding.sentence)
    print("no problem found" if not problems else f"{problems} {'problem' if problems == 1 else 'problems'} found")
    return 2 if problems else 0


@app.command("evaluate")
def evaluate(
    structure: Annotated[
        Path, typer.Argument(metavar="STRUCTURE", help="Any structure file that ASE reads; every frame.")
    ],
    settings: SettingsOption = None,
    assignments: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a frame, one a line.")] = False,
) -> int:
    """Energy, forces, stress, charges and dipole of every frame of a structure file."""
    from voltpi.driver.settings import load_settings
    from voltpi.driver.structures import read_structures

    # settings first: they are quick to be wrong
    tree = load_settings(settings, assignments or ())
    if settings is None and not assignments:
        raise InputError(
            "no settings were given, so there is nothing to compute; add --set model=water or --settings FILE"
        )
    frames = read_structures(structure)
    from voltpi.driver.frames import evaluate_frames
    from voltpi.driver.report import json_line, print_frame

    for k, (atoms, record) in enumerate(zip(frames, evaluate_frames(tree, frames, str(structure)), strict=True)):
        if as_json:
            print(json_line(record), flush=True)
        else:
            print_frame(record, atoms, f"{structure}, frame {k}" if len(frames) > 1 else str(structure))
    return 0


@app.command("drive")
def drive(
    settings: Annotated[Path, typer.Option("--settings", metavar="FILE", help="Settings (YAML).")],
    unix: Annotated[
        str | None, typer.Option("--unix", metavar="NAME", help="The <address> of i-PI's unix socket.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="The host that i-PI runs on (TCP).")] = None,
    port: Annotated[int | None, typer.Option("--port", help="The <port> of i-PI's socket (TCP).")] = None,
    shared_memory: Annotated[bool, typer.Option("--shm", help="For <ffsocket mode='shm'>.")] = False,
    template: TemplateOption = None,
    assignments: SetOption = None,
    socket_prefix: Annotated[
        str, typer.Option("--socket-prefix", help="What i-PI was started with as -S.")
    ] = "/tmp/ipi_",
    wait: Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for i-PI to listen.")] = 60.0,
    reconnects: Annotated[
        int, typer.Option("--reconnects", min=0, help="How often to connect again after a failed evaluation.")
    ] = 0,
) -> int:
    """Serve energies and forces to a running i-PI."""
    if (unix is None) == (host is None and port is None):
        raise InputError("drive needs one address: give --unix NAME, or --host H and --port P, as in i-PI's <ffsocket>")
    if unix is None and port is None:
        raise InputError("drive needs --port P with --host, as in i-PI's <ffsocket>")
    if unix is None and shared_memory:
        raise InputError("--shm needs a unix socket on the same machine: give --unix NAME")
    from voltpi.driver.check import default_template
    from voltpi.driver.settings import Settings, load_settings

    tree = load_settings(settings, assignments or ())
    start = template if template is not None else default_template(settings)
    from voltpi.driver.client import EvaluatorLike, TcpAddress, UnixAddress, serve
    from voltpi.driver.ipi_input import overrides_of
    from voltpi.driver.structures import read_structures

    address = UnixAddress(unix, socket_prefix) if unix is not None else TcpAddress(host or "localhost", port or 0)
    atoms = read_structures(start)[0]
    from voltpi.driver.potentiostat import run_evaluator

    def prepared(tree: Settings) -> EvaluatorLike:
        try:
            return run_evaluator(tree, atoms)
        except VoltPIError as error:
            raise type(error)(f"{start}: {error}") from None

    def with_parameters(parameters: dict[str, str]) -> EvaluatorLike:
        own = dict(item.partition("=")[::2] for item in assignments or ())
        told = load_settings(settings, {**own, **overrides_of(parameters)}, origin="<parameters>")
        return evaluator if told.model_dump() == tree.model_dump() else prepared(told)

    evaluator = prepared(tree)
    return serve(
        evaluator,
        address,
        wait=wait,
        reconnects=reconnects,
        use_shared_memory=shared_memory,
        with_parameters=with_parameters,
    )


@app.command("run")
def run(
    file: Annotated[Path, typer.Argument(metavar="INPUT.xml", help="An i-PI input, or its RESTART to go on.")],
    drivers: Annotated[int, typer.Option("--drivers", min=1, help="Drivers for each <ffsocket>.")] = 1,
    settings: SettingsOption = None,
    template: TemplateOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what went wrong.")] = False,
) -> int:
    """Start i-PI and its drivers, show progress, leave everything on disk."""
    from voltpi.driver.launch import run as launch

    return launch(file, drivers=drivers, settings=settings, template=template, quiet=quiet)


@app.command("train")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Data, network and how to train.")],
    assignments: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what went wrong.")] = False,
) -> int:
    """Train a model on labelled structures, or go on with a training that was stopped."""
    from voltpi.driver.train import train as trained

    trained(config, assignments or (), quiet=quiet)
    return 0


@app.command("fit-charges")
def fit_charges(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of a training, with charges.fit.")],
    assignments: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what went wrong.")] = False,
) -> int:
    """Fit PQEq parameters to dipoles, polarizabilities and Born charges, without training a network."""
    from voltpi.driver.fit_charges import fit_charges as fitted

    fitted(config, assignments or (), quiet=quiet)
    return 0


@app.command("finetune")
def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model's name or a model file.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Extended XYZ files or ASE databases.")],
    freeze: Annotated[
        list[str] | None,
        typer.Option("--freeze", metavar="PATTERN", help="Parameters that stay, such as convolutions.0; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder (default: MODEL-finetuned).")] = None,
    assignments: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what went wrong.")] = False,
) -> int:
    """Train a model further on other data; the same command goes on where it was stopped."""
    from voltpi.driver.train import finetune as tuned

    tuned(model, data, frozen=freeze or (), out=out, overrides=assignments or (), quiet=quiet)
    return 0


@app.command("committee")
def committee(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model's name or a model file.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Extended XYZ files or ASE databases.")],
    members: Annotated[int, typer.Option("--members", help="How many last layers.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder (default: MODEL-committee).")] = None,
    assignments: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what went wrong.")] = False,
) -> int:
    """Give a model a committee, which says how uncertain its energies and forces are."""
    from voltpi.driver.train import add_committee

    add_committee(model, data, members=members, out=out, overrides=assignments or (), quiet=quiet)
    return 0


@app.command(
    "analyze",
    # the analyses define their own options, which argparse reads (it shows the help too)
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def analyze(context: typer.Context) -> int:
    """Numbers and figures from the files of runs: voltpi analyze WHAT FILES."""
    from voltpi.driver.analyze import analyze as lines_of

    for line in lines_of(context.args):
        print(line)
    return 0


def _complain(sentence: str) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def _status_of(error: BaseException) -> int:
    """One line on stderr for any exception, and the exit status that the contract gives it."""
    if isinstance(error, InputError):
        _complain(str(error))
        return 2
    if isinstance(error, VoltPIError):
        _complain(str(error))
        return 1
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _complain("interrupted")
        return 1
    if isinstance(error, BrokenPipeError):
        # whoever read our output has left (`voltpi ... | head`); keep Python from complaining at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    message = getattr(error, "format_message", None)
    if message is not None:  # the command line itself: unknown command, option or value
        _complain(f"{message().rstrip('.')}; see `voltpi --help`")
        return 2
    _complain(f"unexpected {type(error).__name__}: {error} (VOLTPI_DEBUG=1 shows where)")
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. With VOLTPI_DEBUG=1 errors come with their traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status: Any = app(given or ["--help"], prog_name="voltpi", standalone_mode=False)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if os.environ.get("VOLTPI_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        return _status_of(error)
    return status if isinstance(status, int) else 0


def entry() -> None:
    """Entry point of ``python -m voltpi.driver.cli``."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
