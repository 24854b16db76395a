"""What the training loop costs beside its arithmetic, and how soon a run is back: the tiny model, on a CPU.

    python benchmarks/bench_train.py [overhead] [resume] [--seconds 100] [--threads 1 2]

overhead: the whole loop (data, captions, tokens, noise, clipping, EMA, logs, TensorBoard: all that is on by default),
the bare loop and accelerate's take turns in one process, on the same modules and shapes (`train_loops.py`). A turn is
one step, for a machine changes its speed within seconds; a round is all six orders of the three, so that each follows
each as often. The ratio is the median over rounds, told with its quartiles. Measured with each number of computing
threads in turn: by default with one less than there are cores, which leaves one to the thread that makes batches, as a
GPU leaves all of them; and with as many as there are cores, which then share. Threads wait as `sumizome train` lets
them: several spin for a moment, which counts as CPU time. Where other work holds the machine read the parts, which are
timed by themselves. The tokens of tags that come often are known beforehand, as after an hour of training.
resume: a process each time, from its start to its first finished step.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

# As the command `sumizome` sets it, before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from loop_parts import THREAD, timed_parts
from measurement import progress, record
from resume_time import measure_resume
from tiny_run import BATCH, make_inputs, tiny_config
from train_loops import accelerate_loop, bare_loop

from sumizome.models.text_encoding import tokenize
from sumizome.train.build import build_trainer
from sumizome.train.metrics import read_metrics
from sumizome.train.run_dir import hold_run_dir

WARM = 5  # steps
ROUNDS_AT_LEAST = 4
BATCHES = 10  # that the two other loops train on, again and again
KNOWN = 300  # steps whose captions have been tokenised before
OVERHEAD, DATA_WAIT, RESUME = 0.97, 0.01, 10.0
PARTS = ("overhead", "resume")


def measure_overhead(folder: Path, budget: float, threads: Sequence[int]) -> None:
    """`budget` seconds for each number of computing `threads`."""
    config = tiny_config(folder, steps=10**6)
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        task = trainer.task
        for step in range(KNOWN):
            tokenize([caption for batch in trainer.loader.step(step) for caption in batch.captions], config.max_chunks)
        batches = [batch for step in range(BATCHES) for batch in trainer.loader.step(10**6 + step)]
        with closing(trainer.steps()) as reports:
            steps: dict[str, Callable[[], object]] = {
                "the whole loop": lambda: next(reports),
                "bare": bare_loop(task.model, trainer.optimizer, task.objective, batches),
            }
            if find_spec("accelerate"):
                peer = accelerate_loop(task.model, batches, folder, config.log_every)
                steps["diffusers under accelerate"] = peer
            else:
                progress("accelerate is not installed (`pip install 'sumizome[bench]'`): measured without it")
            for one_step in steps.values():
                for _ in range(WARM):
                    one_step()
            for computing in threads:
                torch.set_num_threads(computing)
                seconds = take_turns(steps, budget)
                with timed_parts(trainer) as parts:
                    for _ in range(config.log_every):
                        next(reports)
                on = f"{computing} thread{'s' * (computing > 1)}"
                tell_speed(seconds, on)
                tell_parts(dict(parts), on)
    waits = [line["data_wait"] for line in read_metrics(config.run_dir / "metrics.jsonl")]
    record("data wait, share of a step (median of records)", median(waits), "1", target=DATA_WAIT, better="lower")


def take_turns(steps: dict[str, Callable[[], object]], budget: float) -> dict[str, list[tuple[float, float]]]:
    """(clock, CPU) seconds a step of each loop, round by round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    orders = list(itertools.permutations(steps))
    started = time.perf_counter()
    while len(seconds["bare"]) < ROUNDS_AT_LEAST or time.perf_counter() - started < budget:
        spent = dict.fromkeys(steps, (0.0, 0.0))
        for name in itertools.chain.from_iterable(orders):
            clock, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            spent[name] = spent[name][0] + clock, spent[name][1] + cpu
        for name, (clock, cpu) in spent.items():
            seconds[name].append((clock / len(orders), cpu / len(orders)))
        told = (f"{name} {clock:.3f} s ({cpu / clock:.2f} cores)" for name, (clock, cpu) in spent.items())
        progress(f"round {len(seconds['bare'])}, {len(orders)} steps each: {', '.join(told)}")
    return seconds


def tell_speed(seconds: dict[str, list[tuple[float, float]]], on: str) -> None:
    ours = seconds.pop("the whole loop")
    for peer, theirs in seconds.items():
        for kind, unit in enumerate(("images/s", "images/CPU s")):
            mine, its = [turn[kind] for turn in ours], [turn[kind] for turn in theirs]
            ratios = [b / a for a, b in zip(mine, its, strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            spread = f"quartiles of {len(ratios)} rounds {low:.3f} and {high:.3f}"
            progress(f"{peer}, {unit}, {on}: ratio {middle:.4f}, {spread}")
            record(
                f"the whole loop ÷ {peer}, {unit}, {on} (target is a ratio)",
                BATCH / median(mine),
                unit,
                target=OVERHEAD if peer == "bare" else None,
                better="higher",
                peer=peer,
                peer_value=BATCH / median(its),
                ratio=middle,
            )


def tell_parts(parts: dict[str, float], on: str) -> None:
    step = parts.pop("step")
    for name, seconds in parts.items():
        record(f"beside bare: {name}, share of a step's CPU time, {on}", seconds / step, "1", better="lower")
    added = sum(parts.values())
    whole = step + sum(seconds for name, seconds in parts.items() if THREAD in name)
    share = 1 - added / whole
    record(f"a step's CPU time without these parts, share, {on}", share, "1", target=OVERHEAD, better="higher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--seconds", type=float, default=100.0, help="how long the loops take turns, each run")
    cores = len(os.sched_getaffinity(0))
    both = sorted({max(1, cores - 1), cores})
    parser.add_argument("--threads", type=int, nargs="+", default=both, metavar="N", help="that compute, one run each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("the tiny model and its latents are being made")
        make_inputs(folder)
        if not arguments.parts or "overhead" in arguments.parts:
            measure_overhead(folder, arguments.seconds, arguments.threads)
        if not arguments.parts or "resume" in arguments.parts:
            measure_resume(folder, RESUME)


if __name__ == "__main__":
    main()
