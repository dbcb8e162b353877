"""The command line's training part: prepare, train, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from entropylens.cli_common import Debug, Thinking, prepare_process, reported
from entropylens.errors import SettingError

__all__ = ["export", "prepare", "train"]


def train(
    config: Annotated[
        str, typer.Option(help="A preset such as qwen3-4b-paper, or a YAML file of your own.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Any setting of veRL or bupo, as key=value.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="The inner layer l; auto: what the analyzer recommends; race:A,B,C: who is ahead "
            "on data.val_files after short internal phases."
        ),
    ] = None,
    internal_steps: Annotated[
        str | None, typer.Option(help="Steps that train pi_l first, or auto.")
    ] = None,
    analysis: Annotated[
        Path | None, typer.Option(help="With --layer auto: what `analyze` wrote for this model.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/<config>.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the checked configuration and the command.")
    ] = False,
    probe_layers: Annotated[
        bool,
        typer.Option("--probe-layers", help="Compare each layer's gradient with GRPO's instead."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew, removing the run that is there.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train with BuPO on veRL: an inner layer's policy first, then the model's.

    The same command resumes a run. The first Ctrl-C ends it after its step.
    """
    with reported(debug):
        try:
            from bupo import launch
            from bupo.race import RACE
        except ModuleNotFoundError as error:
            raise SettingError(
                f"training needs {error.name}, which is not installed",
                "pip install 'entropylens[train]', on a GPU 'entropylens[train-gpu]'",
            ) from error
        prepare_process()
        given = list(overrides or [])
        composed, _ = launch.compose(config, given)
        directory = output or Path("runs") / Path(config).stem
        given += launch.internal_steps_overrides(composed, internal_steps)
        if layer is not None and layer.startswith(RACE):
            from bupo.race_runs import plan_race

            if probe_layers:
                raise SettingError(
                    f"--probe-layers trains nothing, and --layer {layer} does", "give one of them"
                )
            racing = plan_race(config, directory, given, layer)
            if dry_run:
                typer.echo(racing.text)
                return
            outcome = racing.run(force=force)
            typer.echo(outcome.to_frame().round(4).to_string(index=False))
            given.append(f"bupo.layer={outcome.winner}")
            typer.echo(f"\n{outcome.reason} See {racing.place / 'race.csv'}")
        elif layer not in (None, launch.AUTO):
            given.append(f"bupo.layer={layer}")
        if probe_layers or layer == launch.AUTO:
            from bupo import preflight

            settings = launch.with_model(config, given)
            if probe_layers:
                place = directory / "layer_probe"
                found = preflight.measure_layers(settings, place, force=force)
                typer.echo(found.to_frame().round(4).to_string(index=False))
                typer.echo(f"\nWritten to {place / 'layer_probe.csv'}; nothing was trained")
                return
            chosen, warnings = preflight.recommended_layer(settings, directory, analysis)
            typer.echo(f"layer {chosen}: see {directory / 'recommendation.json'}")
            for warning in warnings:
                typer.echo(f"warning: {warning}", err=True)
            given.append(f"bupo.layer={chosen}")
        planned = launch.plan(config, directory, given, check_machine=not dry_run)
        if dry_run:
            typer.echo(planned.text)
            return
        typer.echo("\n".join([*planned.estimate.lines(), f"writing to {directory}"]))
        code = launch.start(planned, force=force)
        if code != 0:
            typer.echo(
                f"error: veRL ended with exit code {code}: its own message stands above; the same "
                "command goes on from the last checkpoint",
                err=True,
            )
            raise typer.Exit(code if 0 < code < 256 else 1)
        last = directory / "checkpoints"
        typer.echo(f"\nDone. `entropylens export {last}/global_step_<N> DIR` makes a model of it")


def prepare(
    dataset: Annotated[
        str,
        typer.Argument(help="deepmath | gsm8k | reasoning_gym:TASK | a Hub id | a file."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The parquet file to write.")],
    size: Annotated[int | None, typer.Option(help="Rows; deepmath: 5000 as in the paper.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer counts tokens; `bundled` for SmolLM2.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are dropped.")] = 1024,
    template: Annotated[str, typer.Option(help="chat | plain.")] = "chat",
    thinking: Annotated[Thinking | None, typer.Option(help="For models that can think.")] = None,
    val_size: Annotated[int, typer.Option(help="Rows to hold out into <name>-val.parquet.")] = 0,
    task_option: Annotated[
        list[str] | None, typer.Option(help="name=value for a reasoning-gym task; repeatable.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub dataset.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    debug: Debug = False,
) -> None:
    """Write a training set as veRL reads it: no duplicates, no over-long prompts, counted."""
    with reported(debug):
        from entropylens.preparation import prepare as run

        prepare_process()
        typer.echo(
            run(
                dataset,
                output,
                tokenizer=None if model is None else _tokenizer(model),
                template=template,
                thinking=None if thinking is None else thinking is Thinking.on,
                size=size,
                seed=seed,
                max_prompt_tokens=max_prompt_tokens,
                val_size=val_size,
                task_options=dict(map(_option, task_option or [])),
                revision=revision,
                force=force,
            ).summary
        )


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A veRL checkpoint: global_step_<N>.")],
    directory: Annotated[Path, typer.Argument(help="The Hugging Face directory to write.")],
    dtype: Annotated[
        str, typer.Option(help="auto (the model's own) | float32 | bfloat16 | float16.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory.")] = False,
    debug: Debug = False,
) -> None:
    """Turn a veRL checkpoint into a Hugging Face directory that loads and generates."""
    with reported(debug):
        from entropylens.export import export as run

        prepare_process()
        written = run(
            checkpoint, directory, dtype=dtype, trust_remote_code=trust_remote_code, force=force
        )
        typer.echo(f"Written to {written}")


def _tokenizer(model: str) -> Any:
    from entropylens.demo import demo_model
    from entropylens.sources import hf

    path = demo_model() if model == "bundled" else Path(model).expanduser()
    options = {"local_files_only": True} if path.is_dir() else {}
    source = str(path) if path.is_dir() else model
    found = hf.load_tokenizer(source, path if path.is_dir() else None, options)
    if found is None:
        raise SettingError(f"--model {model!r} has no tokenizer", "name a model that has one")
    return found


def _option(text: str) -> tuple[str, Any]:
    import json

    name, sign, value = text.partition("=")
    if not sign:
        raise SettingError(f"--task-option {text!r} has no value", "write it as name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
