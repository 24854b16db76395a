"""The fault matrix: every fault is injected, what came of it is checked, and docs/faults.md is written from that.

    python tests/faults/run_matrix.py --out docs/faults.md            the full counts (`make test-faults`)
    python tests/faults/run_matrix.py --quick [--only kill disk]      each fault a few times
Exits with 1 if any promise was broken.
"""

import argparse
import math
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from ground import Ground, equal, farthest, losses, samples, small_disk, state, until_training

from sumizome.errors import CheckpointError
from sumizome.train.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint
from sumizome.train.metrics import read_metrics

__all__ = ["main"]


@dataclass(frozen=True)
class Counts:
    """How often each fault is tried."""

    steps: int
    kills: int
    signals: int
    soak_minutes: float


FULL, QUICK = Counts(30, 30, 20, 20.0), Counts(6, 5, 2, 0.5)


@dataclass(frozen=True)
class Line:
    """One row of the matrix."""

    fault: str
    injected: str
    times: str
    result: str
    held: bool


def kill_9(ground: Ground, counts: Counts) -> Line:
    """At random times, a save at every step, so that many kills fall into one; finished runs are compared."""
    chance, work = random.Random(1), ground.work
    ground.train(work / "whole", steps=counts.steps)
    killed = in_save = finished = identical = 0
    run_dir = work / "killed"
    while killed < counts.kills or not finished:
        run = ground.start(run_dir, steps=counts.steps)
        if killed < counts.kills and until_training(run, run_dir):
            time.sleep(chance.expovariate(1 / 0.8))
        if killed < counts.kills and run.ranks[0].is_alive():
            run.signal(signal.SIGKILL)
            in_save += any((run_dir / "checkpoints").glob(".unfinished*"))
            killed += run.wait() == [-signal.SIGKILL]
        elif run.wait() == [0]:
            finished += 1
            identical += equal(run_dir, work / "whole")
            shutil.rmtree(run_dir)
        else:
            return Line("kill −9", "SIGKILL", f"{killed}", f"a resume failed: {run.said()[-300:]}", False)
    result = f"{identical} of {finished} resumed runs identical to the undisturbed one: weights, Adam, EMA, sample log"
    return Line(
        "kill −9", "SIGKILL at random times", f"{killed} ({in_save} within a save)", result, identical == finished
    )


def kill_in_save(ground: Ground, counts: Counts) -> Line:
    """At each file operation of a save in turn: what is then there is this checkpoint or the one before, whole."""
    import torch

    from sumizome.train.checkpoint import Checkpoint, prune_checkpoints, write_checkpoint

    def made(step: int) -> Checkpoint:
        tensor = {"unet.w": torch.full((8, 8), float(step))}
        return Checkpoint(step, tensor, tensor, {"unet.w/exp_avg": tensor["unet.w"]})

    def save(directory: Path, dies_at: int) -> None:
        operations = iter(range(1, dies_at + 1))

        def watch(event: str, _: Any) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(operations, 0) == dies_at:
                os._exit(9)

        sys.addaudithook(watch)
        write_checkpoint(directory, made(3))
        prune_checkpoints(directory, keep=2)

    tried = unusable = 0
    while True:
        directory = ground.work / f"operation-{tried}"
        for step in (1, 2):
            write_checkpoint(directory, made(step))
        child = os.fork()
        if child == 0:
            try:
                save(directory, tried + 1)
            finally:
                os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        saved, complaints = latest_checkpoint(directory)
        good = saved is not None and saved.step in (2, 3) and not complaints
        unusable += not (good and float(saved.read("ema")["unet.w"][0, 0]) == saved.step)
        shutil.rmtree(directory)
        if survived:
            break
        tried += 1
    result = f"step N or N−1 whole after each; {unusable} unusable states"
    return Line("death within a save", "process ends at each file operation in turn", f"{tried}", result, not unusable)


def damaged_files(ground: Ground, counts: Counts) -> Line:
    """Every file of a checkpoint of two ranks, four ways."""
    run_dir = ground.work / "damaged"
    ground.train(run_dir, world=2, steps=3, parallel__strategy="fsdp")
    before, newest = list_checkpoints(run_dir / "checkpoints")
    copy, tried, missed = newest.with_name("whole"), 0, []
    shutil.copytree(newest, copy)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(tried).randrange(len(data))] ^= 1 << random.Random(tried).randrange(8)
        path.write_bytes(data)

    ways: dict[str, Callable[[Path], object]] = {
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "flipped": flip,
        "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "deleted": Path.unlink,
    }
    files = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    for name in files:
        for way, damage in ways.items():
            damage(newest / name)
            saved, complaints = latest_checkpoint(run_dir / "checkpoints")
            named = len(complaints) == 1 and str(name) in complaints[0]
            if saved is None or saved.path != before or not named:
                missed.append(f"{name} {way}")
            shutil.rmtree(newest)
            shutil.copytree(copy, newest)
            tried += 1
    result = f"all detected by name, the previous one used ({len(files)} files)" if not missed else f"missed: {missed}"
    return Line("damaged checkpoint", "each file truncated, flipped, zeroed, deleted", f"{tried}", result, not missed)


def world_sizes(ground: Ground, counts: Counts) -> Line:
    """2 → 1 → 2 and 4 → 2 ranks, changing strategy on the way, against one process."""
    work, steps = ground.work, counts.steps
    ground.train(work / "one", steps=steps)
    worst_loss = worst_weight = 0.0
    same = True
    for name, parts in {
        "212": [(2, "ddp"), (1, "auto"), (2, "fsdp")],
        "42": [(4, "fsdp"), (2, "ddp")],
        "hybrid": [(4, "hybrid")],
    }.items():
        for index, (world, strategy) in enumerate(parts):
            until = math.ceil(steps * (index + 1) / len(parts))
            flags = {"parallel__strategy": strategy, "parallel__shard_size": 2 if strategy == "hybrid" else 0}
            ground.train(work / name, world=world, steps=until, **flags)
        same = same and samples(work / name) == samples(work / "one")
        ours, theirs = losses(work / name), losses(work / "one")
        same = same and ours.keys() == theirs.keys()
        worst_loss = max(worst_loss, *(abs(ours[step] / theirs[step] - 1) for step in theirs))
        worst_weight = max(worst_weight, farthest(work / name, work / "one"))
    held = same and worst_loss <= 1e-5 and worst_weight <= 1e-5
    words = "same samples and seeds of the noise" if same else "OTHER SAMPLES"
    result = f"{words}; loss within {worst_loss:.1e} (relative), weights and EMA within {worst_weight:.1e} (absolute)"
    how = "2 (DDP) → 1 → 2 (FSDP2), 4 (FSDP2) → 2 (DDP), 4 (hybrid 2 × 2), each against one process"
    return Line("other number of ranks", how, f"{steps} steps each", result, held)


def stop_signals(ground: Ground, counts: Counts) -> Line:
    """SIGTERM to both ranks at random times."""
    chance, work = random.Random(2), ground.work
    ground.train(work / "two", world=2, steps=counts.steps)
    run_dir, sent, slowest, bad, finished, identical = work / "stopped", 0, 0.0, [], 0, 0
    while sent < counts.signals or not finished:
        run = ground.start(run_dir, world=2, steps=counts.steps)
        if sent < counts.signals and until_training(run, run_dir):
            time.sleep(chance.uniform(0, 0.7))
            stopping = time.monotonic()
            run.signal(signal.SIGTERM)
            codes = run.wait(120)
            if codes == [75, 75]:
                sent += 1
                slowest = max(slowest, time.monotonic() - stopping)
                done = max(line["step"] for line in samples(run_dir))
                if state(run_dir)[0] != done:
                    bad.append(f"step {done} done, {state(run_dir)[0]} saved")
                continue
        else:
            codes = run.wait()
        if codes != [0, 0]:
            bad.append(f"exit {codes}: {run.said()[-200:]}")
            break
        finished += 1
        identical += equal(run_dir, work / "two")
        shutil.rmtree(run_dir)
    held = not bad and slowest <= 30 and identical == finished
    result = f"exit 75, current step saved within {slowest:.1f} s; {identical} of {finished} resumed runs identical"
    return Line("SIGTERM", "to 2 ranks at random times", f"{sent}", "; ".join([result, *bad]), held)


def save_signal(ground: Ground, counts: Counts) -> Line:
    """SIGUSR1 to one of two ranks: a checkpoint, and on."""
    run_dir = ground.work / "asked"
    run = ground.start(run_dir, world=2, steps=8, checkpoint__every=0)
    until_training(run, run_dir, lines=2)
    asked = time.monotonic()
    run.signal(signal.SIGUSR1, rank=1)
    while not list_checkpoints(run_dir / "checkpoints") and time.monotonic() - asked < 120:
        time.sleep(0.05)
    seconds = time.monotonic() - asked
    codes = run.wait()
    steps = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    held = codes == [0, 0] and seconds <= 30 and len(steps) == 2
    return Line("SIGUSR1", "to one of 2 ranks", "1", f"saved within {seconds:.1f} s, trained on to the end", held)


def nan_on_one_rank(ground: Ground, counts: Counts) -> Line:
    """The loss of one sample on rank 1 is NaN at the third step."""

    def poison(rank: int) -> None:
        import torch

        from sumizome.train import denoising as module

        honest, calls = module.training_loss, [0]

        def poisoned(*arguments: Any) -> Any:
            loss = honest(*arguments)
            calls[0] += 1
            if rank == 1 and calls[0] == 5:  # two micro-batches a rank and step
                loss.weighted.data[1] = float("nan")
                return type(loss)(loss.weighted * torch.tensor([1.0, float("nan")]), loss.unweighted, loss.timesteps)
            return loss

        module.training_loss = poisoned

    run_dir = ground.work / "nan"
    run = ground.start(run_dir, world=2, steps=6, first=poison)
    codes = run.wait()
    culprit = next(line for line in samples(run_dir) if line["step"] == 3 and line["place"] == 2)["samples"][1]
    ground.train(ground.work / "before", world=2, steps=2, optim__warmup_steps=2)
    step, weights = state(run_dir)
    same = step == 2 and all(
        bool((value == weights[name]).all()) for name, value in state(ground.work / "before")[1].items()
    )
    named = all(f"in samples {culprit}" in " ".join(run.said(rank).split()) for rank in (0, 1))
    held = codes == [2, 2] and same and named
    result = "no rank's weights changed, the sample named on both, exit 2" if held else f"{codes} {same} {named}"
    return Line("NaN", "in one sample's loss on one of 2 ranks", "1", result, held)


def disk_full(ground: Ground, counts: Counts) -> Line:
    """Checkpoints on a tmpfs that holds two of them and no third."""
    run_dir = ground.work / "full"
    ground.train(ground.work / "roomy", steps=6)
    size = sum(path.stat().st_size for path in list_checkpoints(ground.work / "roomy/checkpoints")[0].rglob("*"))
    try:
        with small_disk(run_dir / "checkpoints", math.ceil(2.4 * size / 2**20)):
            run = ground.start(run_dir, steps=6)
            codes = run.wait()
            said = " ".join(run.said().split())
            whole = list_checkpoints(run_dir / "checkpoints")
            for path in whole:
                verify_checkpoint(path)
            left = list((run_dir / "checkpoints").glob(".unfinished*"))
            os.system(f"mount -o remount,size={10 * size} '{run_dir / 'checkpoints'}'")
            ground.train(run_dir, steps=6)
            same = equal(run_dir, ground.work / "roomy")
    except PermissionError as error:
        return Line("disk full", "a small tmpfs", "0", f"not run: {error}", True)
    held = codes == [2] and "No space left" in said and len(whole) == 2 and not left and same
    result = (
        "alarm at each failed save, exit 2 after three, 2 earlier ones verify, nothing half left; with room, identical"
    )
    return Line("disk full", "checkpoints on a small tmpfs", "1", result if held else f"{codes} {said[-300:]}", held)


def stopped_rank(ground: Ground, counts: Counts) -> Line:
    """SIGSTOP to one of two ranks."""
    run_dir = ground.work / "hung"
    run = ground.start(run_dir, world=2, steps=500, parallel__hang_timeout=6)
    until_training(run, run_dir, lines=12)
    at = time.monotonic()
    run.signal(signal.SIGSTOP, rank=1)
    run.ranks[0].join(90)
    seconds, code = time.monotonic() - at, run.ranks[0].exitcode
    run.signal(signal.SIGKILL)
    run.wait()
    said = " ".join(run.said().split())
    saved, complaints = latest_checkpoint(run_dir / "checkpoints")
    held = code == 70 and "rank 1 on" in said and "no sign of life" in said and saved is not None and not complaints
    step = saved.step if saved else "none"
    result = f"rank 1 named, exit 70 after {seconds:.0f} s (timeout 6 s), checkpoint of step {step} whole"
    return Line("SIGSTOP", "of one of 2 ranks", "1", result if held else f"{code} {said[-300:]}", held)


def killed_rank(ground: Ground, counts: Counts) -> Line:
    """kill −9 of one of two ranks while it saves."""
    run_dir, worst, bad, tried = ground.work / "lost", 0.0, [], max(1, counts.signals // 4)
    for _ in range(tried):
        run = ground.start(run_dir, world=2, steps=500, parallel__hang_timeout=20)
        until_training(run, run_dir, lines=8)
        while not any((run_dir / "checkpoints").glob(".unfinished*")) and run.ranks[0].is_alive():
            time.sleep(0.001)
        at = time.monotonic()
        run.signal(signal.SIGKILL, rank=1)
        run.ranks[0].join(60)
        worst, code = max(worst, time.monotonic() - at), run.ranks[0].exitcode
        run.signal(signal.SIGKILL)
        run.wait()
        try:
            _, complaints = latest_checkpoint(run_dir / "checkpoints")
        except CheckpointError as error:
            complaints = [str(error)]
        if code in (0, None) or complaints:
            bad.append(f"exit {code}, {complaints}")
        shutil.rmtree(run_dir)
    result = f"the other ended, non-zero, within {worst:.0f} s; the checkpoint before verifies" if not bad else f"{bad}"
    return Line("loss of a rank", "kill −9 of one of 2 ranks within a save", f"{tried}", result, not bad)


def straggler(ground: Ground, counts: Counts) -> Line:
    """One rank's forward pass takes longer by 0.3 s."""

    def delay(rank: int) -> None:
        from sumizome.train import denoising as module

        honest = module.training_loss

        def slow(*arguments: Any) -> Any:
            time.sleep(1.5 if rank == 1 else 0)
            return honest(*arguments)

        module.training_loss = slow

    run_dir = ground.work / "slow"
    run = ground.start(run_dir, world=2, steps=6, first=delay, log_every=3)
    codes = run.wait()
    found = [slow for line in read_metrics(run_dir / "metrics.jsonl") for slow in line.get("slow_ranks", [])]
    held = codes == [0, 0] and bool(found) and all(slow["rank"] == 1 for slow in found)
    share = max((slow["share"] for slow in found), default=0.0)
    result = f"rank 1 reported, {share:.0%} of a step lost to it" if held else f"{codes} {found}"
    return Line("straggler", "a rank slower by 1.5 s a forward pass, of 2", "6 steps", result, held)


def two_trainers(ground: Ground, counts: Counts) -> Line:
    """A second trainer on a run directory at work."""
    run_dir = ground.work / "shared"
    run = ground.start(run_dir, world=2, steps=500)
    until_training(run, run_dir)
    second = ground.start(run_dir.parent / "other", "--run-dir", str(run_dir))
    codes = second.wait()
    said = " ".join(second.said().split())
    run.signal(signal.SIGTERM)
    first = run.wait(60)
    held = codes == [2] and "another trainer is at work here (process" in said and first == [75, 75]
    return Line("two trainers", "on one run directory", "1", "the second refused, naming process and host", held)


def soak(ground: Ground, counts: Counts) -> Line:
    """Memory, descriptors and files of a run that saves at every other step."""
    run_dir, seconds = ground.work / "soak", 60 * counts.soak_minutes
    run = ground.start(run_dir, steps=10**6, checkpoint__every=2)
    until_training(run, run_dir, lines=40)
    pid = run.ranks[0].pid
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end and run.ranks[0].is_alive():
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        memory = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        seen.append((time.monotonic(), memory / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))))
        time.sleep(max(0.2, seconds / 200))
    temporary = len(list((run_dir / "checkpoints").iterdir()))
    run.signal(signal.SIGTERM)
    codes = run.wait(60)
    half = seen[len(seen) // 2 :]
    minutes = (half[-1][0] - half[0][0]) / 60
    quarter = max(1, len(half) // 4)
    early, late = (sum(m for _, m, _ in part) / len(part) for part in (half[:quarter], half[-quarter:]))
    slope = (late - early) / max(minutes, 1e-9)
    descriptors = max(n for *_, n in seen) - min(n for *_, n in seen)
    left = list((run_dir / "checkpoints").glob(".unfinished*"))
    steady = slope < 1 or counts.soak_minutes < 5  # a short soak's slope is noise; it is shown all the same
    held = codes == [75] and steady and descriptors <= 8 and temporary <= 4 and not left
    steps = max(line["step"] for line in samples(run_dir))
    result = f"memory {slope:+.2f} MB/min over the second half, descriptors within {descriptors}, nothing left over"
    return Line("soak", f"{counts.soak_minutes:g} minutes, {steps} steps, a save every 2", "1", result, held)


FAULTS: dict[str, Callable[[Ground, Counts], Line]] = {
    "kill": kill_9,
    "operations": kill_in_save,
    "damage": damaged_files,
    "ranks": world_sizes,
    "sigterm": stop_signals,
    "sigusr1": save_signal,
    "nan": nan_on_one_rank,
    "disk": disk_full,
    "sigstop": stopped_rank,
    "lost": killed_rank,
    "straggler": straggler,
    "two": two_trainers,
    "soak": soak,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few times each")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="some of the faults")
    parser.add_argument("--out", type=Path, help="write the matrix to this page")
    options = parser.parse_args(arguments)
    counts, lines = QUICK if options.quick else FULL, []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in options.only:
            started = time.monotonic()
            ground = Ground(Path(folder) / name)
            try:
                line = FAULTS[name](ground, counts)
            except Exception as error:  # a fault that breaks its own test is a broken promise, and the rest goes on
                line = Line(name, "", "", f"{type(error).__name__}: {error}", False)
            lines.append(line)
            mark = "held  " if line.held else "BROKEN"
            print(f"{mark} {line.fault} · {line.injected} · {line.times} · {line.result}", end=" ")
            print(f"[{time.monotonic() - started:.0f} s]", flush=True)
            shutil.rmtree(ground.work, ignore_errors=True)
    if options.out:
        options.out.write_text(_page(lines, "--quick" if options.quick else ""), encoding="utf-8")
    return 0 if all(line.held for line in lines) else 1


def _page(lines: list[Line], flags: str) -> str:
    command = f"python tests/faults/run_matrix.py {flags} --out docs/faults.md".replace("  ", " ")
    rows = [
        f"| {line.fault} | {line.injected} | {line.times} | {'held' if line.held else '**BROKEN**'}: {line.result} |"
        for line in lines
    ]
    import torch

    return "\n".join(
        [
            "# The fault matrix",
            "",
            "What is done to a run, how often, and what came of it. Written by",
            f"`{command}`",
            f"({datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}):",
            "a U-Net of SDXL's architecture with 0.5 M parameters, gloo ranks on one machine, a save at every step",
            "unless said otherwise. `make test-faults` runs the full counts.",
            "",
            "| fault | how injected | how often | result |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
