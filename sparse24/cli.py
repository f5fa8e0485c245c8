"""The command line: `python -m sparse24 env | bench | pretrain | tune`.

The options of `pretrain` are the fields of `pretrain.settings.Settings`, so that names, defaults and help are written
once. A bad value, input or checkpoint ends in one line on stderr, and exit status 2.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .errors import Sparse24Error
from .pretrain.settings import Settings, flag_of

app = typer.Typer(
    name="sparse24",
    help="2:4 sparse training of transformer feed-forward layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; our own errors become one line on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a log file, lines come in order with those of the progress bar; any file name can be printed.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        app(prog_name="python -m sparse24")
    except Sparse24Error as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def commands() -> None:
    """2:4 sparse training of transformer feed-forward layers."""


@app.command()
def env() -> None:
    """Versions, devices, and whether sparse training is available here."""
    import platform

    import torch

    import sparse24

    print(f"sparse24      {sparse24.__version__}")
    print(f"libsparse24   {what_was_built()}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    print(f"torch         {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for package in ("transformers", "tokenizers", "safetensors"):
        print(f"{package:13s} {installed_version(package)}")
    devices: list[Any] = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        found = sparse24.is_available(device)
        name = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"
        otherwise = "2:4 trains, without a gain in speed" if device == "cpu" else "models stay dense"
        state = "2:4 products run" if found else otherwise
        reason = f": {found.reason}" if found.reason else ""
        print(f"{device:13s} {name}, backend {found.backend}, arch {found.arch}; {state}{reason}")


def what_was_built() -> str:
    """For which GPUs the library was compiled."""
    from . import _library

    if _library.binding() is None:
        return "not built"
    if not _library.cuda_built():
        return "for the CPU"
    info = _library.device_info(-1)
    return f"kernels for {info['cuda_archs']}; products for {info['gemm_archs']}"


def installed_version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- bench ---------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(help="Parts of the suite: ffn, tokens, block, step. Default: all.")
    ] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of a layer of your own, instead of the suite.")] = None,
    d_ff: Annotated[int | None, typer.Option(help="Its hidden width.")] = None,
    tokens: Annotated[int, typer.Option(help="Its tokens per forward call: sequences x length.")] = 8192,
    gated: Annotated[bool | None, typer.Option("--gated/--plain", help="SwiGLU (default), or GELU, no gate.")] = None,
    operand: Annotated[str, typer.Option(help="Its 2:4 operand: weight, or activation (squared ReLU).")] = "weight",
    master: Annotated[str, typer.Option(help="Its weights: bf16, or fp32 under bf16 autocast.")] = "bf16",
    micro_batches: Annotated[int, typer.Option(help="Its forward calls per optimizer step.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of the suite only.")] = False,
    csv: Annotated[str | None, typer.Option(help="Folder for tables as CSV.")] = None,
    report: Annotated[str | None, typer.Option(help="A JSON file with device, versions and tables, to share.")] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Training steps under FSDP2, on all ranks of torchrun.")
    ] = False,
    model: Annotated[str, typer.Option(help="With --distributed: llama-8B, llama-3B, llama-1B or tiny.")] = "llama-8B",
    layers: Annotated[int, typer.Option(help="With --distributed: blocks of the model to keep. 0: all.")] = 0,
    arms: Annotated[str, typer.Option(help="With --distributed: names, separated by commas. Default: all.")] = "",
    warm: Annotated[int, typer.Option(help="With --distributed: untimed steps of each arm and round.")] = 30,
    steps: Annotated[int, typer.Option(help="With --distributed: timed steps of each arm and round.")] = 50,
    rounds: Annotated[int, typer.Option(help="With --distributed: turns of each arm.")] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="With --distributed: compile block by block.")
    ] = True,
    name: Annotated[str, typer.Option(help="With --distributed: name of the CSV file.")] = "distributed",
) -> None:
    """Time dense against 2:4 on this machine's GPU; for a layer of your own, also its break-even token count."""
    from pathlib import Path

    from .benchmark import activations, command

    folder = Path(csv).expanduser() if csv else None
    file = Path(report).expanduser() if report else None
    command.check_operand(operand, of_own_layer=d_model is not None)
    if distributed:
        if parts or d_model is not None or d_ff is not None or quick or report:
            raise Sparse24Error(
                "--distributed times whole models: leave out parts, --quick, --d-model, --d-ff and --report"
            )
        from .benchmark.distributed import Plan, run

        chosen = tuple(arm.strip() for arm in arms.split(",") if arm.strip())
        run(Plan(model, layers, tokens, chosen, warm, steps, rounds, compiled), folder, name)
        return
    if d_model is None and d_ff is None:
        command.run_suite(tuple(parts or ()), quick, folder, file)
        return
    if d_model is None or d_ff is None:
        raise Sparse24Error("--d-model and --d-ff belong together; give both, or neither for the suite")
    if parts:
        raise Sparse24Error("parts of the suite and --d-model exclude each other")
    own_layer = activations.own_layer if operand == "activation" else command.own_layer
    own_layer(tokens, d_model, d_ff, gated, command.master_label(master), micro_batches, folder, file)


# ---- pretrain ------------------------------------------------------------------------------------------------------


def options_of(settings: type, leave_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A command-line option for each field of a dataclass; its help is in the field's metadata."""
    hints = typing.get_type_hints(settings)
    parameters = []
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        kind, default = hints[field.name], field.default
        if typing.get_origin(kind) is tuple:
            kind, default = list[str], []
        elif isinstance(kind, types.UnionType):
            kinds = typing.get_args(kind)  # text, where it may say several things
            preferred = (choice for choice in (bool, str) if choice in kinds)
            kind = next(preferred, next(t for t in kinds if t is not type(None)))
            kind = typing.Optional[kind]  # noqa: UP045
        name = flag_of(field.name)
        if bool in (kind, *typing.get_args(kind)) and default is not False:
            name = f"{name}/--no-{name[2:]}"
        annotation = Annotated[kind, typer.Option(name, help=field.metadata["help"])]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def with_options(settings: type, leave_out: tuple[str, ...] = ()) -> Callable:
    """Add the options of a dataclass to those of a function that takes them as `**values`."""

    def decorate(function: Callable) -> Callable:
        hints = typing.get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
        parameters = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD] + options_of(settings, leave_out)
        function.__signature__ = inspect.Signature(parameters)
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def given(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The values that the user wrote, lists as tuples."""
    # by name: some versions of typer bring a click of their own
    written = {k: v for k, v in values.items() if context.get_parameter_source(k).name == "COMMANDLINE"}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}


@app.command()
@with_options(Settings)
def pretrain(context: typer.Context, **values: Any) -> None:
    """Pre-train a GPT-2 or Llama on text, with dense or 2:4 sparse FFNs."""
    from pathlib import Path

    from .pretrain import Stopped, pretrain
    from .pretrain.saved import from_json, load_config

    asked = given(context, values)
    start = Settings()
    if asked.get("resume") and asked.get("out"):
        start = from_json(load_config(Path(asked["out"]).expanduser())["settings"])
    try:
        pretrain(dataclasses.replace(start, **asked))
    except KeyboardInterrupt:
        print("interrupted; what was saved before is whole", file=sys.stderr)
        raise typer.Exit(130) from None
    except Stopped as e:
        print(
            f"stopped; saved {e.path}; go on with: python -m sparse24 pretrain --resume --out {e.out}", file=sys.stderr
        )
        raise typer.Exit(128 + e.signal) from None


# ---- tune ----------------------------------------------------------------------------------------------------------

# options of `pretrain` that mean nothing to a search for the decay
NOT_FOR_TUNE = (
    "operand", "ffn", "compare", "time_ratio", "decay", "decay_schedule", "method", "dense_fraction", "dense_at",
    "resume", "overwrite", "compile", "deterministic", "eval_interval", "eval_tokens", "log_interval", "save_interval",
    "samples", "sample_tokens",
)  # fmt: skip


@app.command()
@with_options(Settings, leave_out=NOT_FOR_TUNE)
def tune(
    context: typer.Context,
    grid: Annotated[
        list[float], typer.Option(help="A decay to try; may be repeated. Default: 0 and 1e-6 ... 1e-2.")
    ] = [],  # noqa: B006
    probe_step: Annotated[int | None, typer.Option(help="Steps of each short run. Default: the warm-up.")] = None,
    **values: Any,
) -> None:
    """Find the masked decay for a run of `pretrain` by short runs inside its warm-up."""
    from .pretrain.tuning import tune

    try:
        result = tune(Settings(**given(context, values)), grid, probe_step)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the runs that are left", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if result.decay is not None else 1)
