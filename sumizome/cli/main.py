"""`sumizome COMMAND …`: finds the command's module, parses its flags, runs it, and prints a user's error in one line.

A command is a module of this package ("data report" is `data_report`) with a frozen dataclass `Command`, whose
attribute docstrings are the help, and `run(command)`. Nothing heavy is imported before the command is known, so
`sumizome --help` answers at once.
"""

import gc
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence

from sumizome import __version__
from sumizome.cli.quick_imports import quick_imports
from sumizome.errors import ConfigError, SumizomeError
from sumizome.settings import parse

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "init": "make a tiny model of SDXL's architecture, to try everything on a CPU",
    "ingest": "read folders of tagged pictures, decode each one, write a manifest",
    "tags": "show a manifest's tags by category and frequency, and write their loss weights as a table",
    "data report": "show a data set on one HTML page: buckets, tags, weights, captions, duplicates, rejects",
    "prepare": "encode the manifest's pictures into latent shards, by aspect-ratio bucket",
    "latents stats": "measure the mean and deviation of each latent channel, as TOML that training takes",
    "plan": "say what a run would take: memory, FLOP, checkpoints, days; and what would make it fit",
    "train": "train, or go on training, from a TOML file and flags",
    "sample": "draw pictures from prompts, from pure noise",
    "prompt explain": "show a prompt's chunks, tokens and weights in each program's syntax",
    "grid": "draw two settings against each other: one labelled picture and its table",
    "evaluate": "measure models: colours, tags, distance from the data, loss by timestep; one page, N compared",
    "figures": "draw the report's figures on your own model, each with a number under it",
    "export": "write a trained model as a diffusers folder or one safetensors file",
    "vae train": "finetune a VAE's decoder on your pictures; latents stay valid",
    "vae evaluate": "measure decoders on held-out pictures, before and after, beside JPEG; one page",
    "vae bake": "put a finetuned decoder into a model, and say whether it is safe in fp16 and in tiles",
    "inspect": "say what a model file is, what is wrong with it, what each program makes of it",
    "mend": "write a corrected copy of a model: marks, metadata, dtype, VAE, layout",
    "merge": "average models, or add the difference of two to a third",
    "schedule": "show timestep, sigma, SNR and loss weight of each sampling step",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what the user can do, or 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before torch is imported: OpenMP threads that spin for long at a barrier starve every other process of a small
    # machine, and threads that sleep at once halve the speed of small operations. So they spin for a moment.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Imports make objects that stay, and every 700 of them Python looks whether they can go: a tenth of the start.
    gc.set_threshold(50_000, 20, 20)
    # A path need not be UTF-8, and is printed all the same.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except SumizomeError as error:
        print(f"sumizome: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sumizome: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has left: not an error. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch itself may not be imported
            raise
        print(
            f"sumizome: the device's memory is full: {str(error).split('. ')[0]}; use smaller batches", file=sys.stderr
        )
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"sumizome {__version__}")
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    group = {command: what for command, what in COMMANDS.items() if command.startswith(f"{name} ")}
    if group and (not rest or rest[0] in ("-h", "--help")):
        print(_overview(group, name))
        return
    if name not in COMMANDS:
        longer = group and not rest[0].startswith("-")
        name = " ".join(arguments[:2]) if longer else name
        raise ConfigError(f"unknown command '{name}'{_did_you_mean(name)}; `sumizome --help` lists them")
    with quick_imports():
        module = importlib.import_module(f"sumizome.cli.{name.replace(' ', '_')}")
    module.run(parse(module.Command, rest, prog=f"sumizome {name}", description=module.__doc__))


def _overview(commands: Mapping[str, str] = COMMANDS, group: str = "") -> str:
    """The help of `sumizome`, or of a `group` of commands that share their first word."""
    width = max(len(name) for name in commands)
    lines = [f"  {name:<{width}}   {what}" for name, what in commands.items()]
    return "\n".join(
        [
            f"sumizome {__version__}: SDXL-family models to pure noise and back",
            "",
            f"usage: sumizome {f'{group} ' if group else ''}COMMAND [FILE.toml] [OPTIONS]",
            "",
            *lines,
            "",
            "A TOML file holds the same keys as the options; an option on the command line wins.",
            "`sumizome COMMAND --help` lists a command's options.",
        ]
    )


def _did_you_mean(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
