"""Kill training processes at random points, resume them, and compare the results with uninterrupted runs.

    python -m tests.faults.campaign --kills 100 --seed 0

Pretraining (NoR-MAE, and DINO with its views, teacher and centre), fine-tuning and linear probes of a small model on a
few images are killed (SIGKILL) several times each and restarted with the same command. The seed determines where and
when each process is killed, the number of loading workers, and the interval between checkpoints. A kill is survived if

* the run ends with exactly the weights, optimizer state, losses and accuracies of the uninterrupted run;
* the newest checkpoint loads after the kill;
* no more steps are repeated than lie between two checkpoints;
* no line of the records is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import parser, progress, publish, where
from tests.faults import inject
from tests.faults.few import CLASSIFIER, LAST_STEP, few
from tests.runs import Training, assert_same_end, final, finish, losses, metrics, start_ranks, tiny_for
from tools.markdown import make_table

PRETRAIN, FINETUNE, PROBE = "main_pretrain", "main_finetune", "main_linprobe"
NAMES = {PRETRAIN: "pretraining", FINETUNE: "fine-tuning", PROBE: "linear probe"}
PROGRAMS = ((PRETRAIN, 1), (FINETUNE, 1), (PROBE, 1), (PRETRAIN, 2))  # with the number of processes
DINO = "--out_dim 32 --head_hidden_dim 16 --head_bottleneck_dim 8 --local_crops 2 --local_size 4".split()
SAVE_STEPS = (1, 2, 3)
KILLS_A_RUN = (3, 8)  # at least and at most
MINUTE = 60.0
LAUNCHER_SECONDS = 10.0  # the launcher kills the remaining processes so long after the first one exited


@dataclass(frozen=True)
class Subject:
    """A training job to kill: a program, its arguments, its number of processes, and its uninterrupted run.

    `reference` is the folder of the uninterrupted run, `seconds` its duration.
    """

    script: str
    words: Sequence[object]
    processes: int
    reference: Path
    seconds: float
    method: str = ""

    @property
    def name(self) -> str:
        method = f" of {self.method}" if self.method else ""
        return NAMES[self.script] + method + (f", {self.processes} processes" if self.processes > 1 else "")

    def start(self, folder: Path, *words: object, fault: Callable[[], None] | None = None) -> list[Training]:
        if self.processes > 1:
            return start_ranks(self.processes, folder, *self.words, *words, script=self.script)
        tiny = not self.method  # with a method, `words` already contain the options of the tiny model
        return [Training(folder, *self.words, *words, script=self.script, tiny=tiny, fault=fault)]


@dataclass
class Kill:
    """One injected fault and its cost. `survived` is set when the run has ended."""

    subject: str
    where: str
    run: int
    workers: int
    save_steps: int
    steps_done: int
    steps_kept: int
    seconds_lost: float
    survived: bool = False
    trouble: str = ""


@dataclass
class Fault:
    """How a process is killed: by a fault injected into it (`injected`), or by a signal from outside (`kill`)."""

    where: str
    injected: Callable[[], None] | None = None
    kill: Callable[[list[Training]], None] | None = None


def draw(chance: random.Random, subject: Subject, at: int) -> Fault:
    """Draw a fault for a run that has reached step `at`."""
    if subject.processes > 1:
        return Fault("one of two processes", kill=partial(after_step, chance, at))
    left = subject.seconds * (1 - at / LAST_STEP[subject.script])
    places: dict[str, Callable[[], Fault]] = {
        "a random moment": lambda: Fault("", kill=partial(after_seconds, chance.uniform(0, left))),
        "a random step": lambda: Fault("", kill=partial(after_step, chance, at)),
        "inside a save": lambda: Fault("", partial(inject.killed_inside_save, chance.randint(1, 3), chance.random())),
        "at a rename": lambda: Fault("", partial(inject.killed_at_rename, chance.randint(1, 8), chance.random() < 0.5)),
        "inside an evaluation": lambda: Fault(
            "", partial(inject.signals_inside_evaluation, chance.randint(1, 3), signal.SIGKILL)
        ),
        "before a line of the records": lambda: Fault("", partial(inject.killed_before_line, chance.randint(1, 6))),
        "inside a line of the records": lambda: Fault("", partial(inject.killed_inside_line, chance.randint(1, 6))),
    }
    where = chance.choice(list(places))
    return dataclasses.replace(places[where](), where=where)


def after_seconds(seconds: float, processes: list[Training]) -> None:
    """Kill the first process after `seconds`."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it has already exited
        processes[0].send(signal.SIGKILL)


def after_step(chance: random.Random, at: int, processes: list[Training]) -> None:
    """Kill one of the processes within a step, 1 to 5 steps after step `at`."""
    victim = chance.choice(processes)
    if processes[0].reaches(at + chance.randint(1, 5)):
        after_seconds(chance.uniform(0, 0.03), [victim])


def wait_as_launcher(processes: list[Training]) -> None:
    """Wait until all processes have exited; as a launcher does, kill those that outlive the first one for too long."""
    deadline = time.monotonic() + MINUTE
    while not all(process.is_over for process in processes):
        if any(process.is_over for process in processes):
            deadline = min(deadline, time.monotonic() + LAUNCHER_SECONDS)
        if time.monotonic() > deadline:
            for process in processes:
                after_seconds(0, [process])
        time.sleep(0.02)


def kept_step(folder: Path) -> int:
    """Load the newest checkpoint and return its step; 0 if no checkpoint exists yet."""
    return final(folder)["step"] if (folder / "checkpoints" / "last.pth").exists() else 0


def epochs(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the record of each epoch in log.txt; the last one where an epoch was logged several times."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return {line["epoch"]: {name: value for name, value in line.items() if name != "run_id"} for line in lines}


def complete_lines(folder: Path) -> str:
    """Return the lines of metrics.jsonl without an incomplete last line."""
    path = folder / "metrics.jsonl"
    return path.read_text().rpartition("\n")[0] if path.exists() else ""


class Campaign:
    """Start, kill and resume training runs until a number of kills is reached."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.chance = random.Random(seed)
        self.kills: list[Kill] = []
        self.runs = 0
        self.subjects = self._subjects()

    def _subjects(self) -> list[Subject]:
        """Run each job without interruption. Pretraining evaluates nearest neighbours after every epoch."""
        plain = few()
        scripts = {PRETRAIN: [*plain, "--knn_every", 1]}
        trained = ["--init_from", self.folder / "reference" / f"{PRETRAIN}1" / "checkpoints" / "last.pth"]
        scripts[FINETUNE] = [*plain, *CLASSIFIER, *trained, "--ema", 0.9]
        scripts[PROBE] = [*plain, *CLASSIFIER, *trained]
        dino = [*tiny_for("dino"), *scripts[PRETRAIN], "--method", "dino", *DINO]
        finish(self.folder / "first", *plain)  # imports everything, so that the durations below do not include it
        found = []
        kinds = [(script, scripts[script], processes, "") for script, processes in PROGRAMS] + [
            (PRETRAIN, dino, 1, "DINO")
        ]
        for script, words, processes, method in kinds:
            reference = self.folder / "reference" / f"{script}{processes}{method}"
            subject = Subject(script, words, processes, reference, 0.0, method)
            began = time.monotonic()
            codes = [process.wait() for process in subject.start(reference)]
            assert codes == [0] * processes, codes
            found.append(dataclasses.replace(subject, seconds=time.monotonic() - began))
            self.say(f"uninterrupted: {found[-1].name}, {found[-1].seconds:.1f} s")
        return found

    def resume(self, kills: int) -> None:
        """Run jobs until there were `kills` kills: pretraining, fine-tuning, and one of the others, in turn."""
        pretrain, finetune, *others = self.subjects
        while len(self.kills) < kills:
            other = others[(self.runs // 3) % len(others)]
            self.run([pretrain, finetune, other][self.runs % 3], kills - len(self.kills))

    def run(self, subject: Subject, most: int) -> None:
        """Run a job to its end, kill it at most `most` times on the way, and compare its end with the reference."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        kills: list[Kill] = []
        try:
            for _ in range(min(most, self.chance.randint(*KILLS_A_RUN))):
                kill = self.kill_once(subject, folder)
                if kill is None:  # the run ended before the kill
                    break
                kills.append(kill)
            self.finish_and_compare(subject, folder)
        except (AssertionError, ValueError) as error:  # ValueError: a checkpoint that does not load
            kills = kills or [Kill(subject.name, "the first start", self.runs, 0, 0, 0, 0, 0.0)]
            for kill in kills:
                kill.trouble = str(error)[:2000] or "another end"
        else:
            for kill in kills:
                kill.survived = True
        self.kills += kills
        self.say(f"run {self.runs}, {subject.name}: {len(kills)} kills; {len(self.kills)} in all")

    def kill_once(self, subject: Subject, folder: Path) -> Kill | None:
        """Start or resume the job and kill it once. Return None if it finished before."""
        workers = self.chance.choice([0, 0, 2]) if subject.processes == 1 else 0
        save_steps = self.chance.choice(SAVE_STEPS)
        kept, before = kept_step(folder), complete_lines(folder)
        fault = draw(self.chance, subject, max([kept, *losses(folder)]))
        began = time.time()
        processes = subject.start(folder, "--num_workers", workers, "--save_steps", save_steps, fault=fault.injected)
        if fault.kill is not None:
            fault.kill(processes)
            wait_as_launcher(processes)
        codes = [process.wait(MINUTE) for process in processes]
        if codes == [0] * len(codes):
            return None
        output = "\n".join(process.stderr for process in processes)
        assert -signal.SIGKILL in codes, f"ended with {codes}: {output}"
        ended = time.time()
        assert complete_lines(folder).startswith(before), "a line of the records was lost"
        saved = kept_step(folder)
        assert saved >= kept, f"the checkpoint of step {kept} was replaced by one of step {saved}"
        new_steps = [line["step"] for line in metrics(folder)[before.count("\n") + bool(before) :]]
        done = max([saved, *new_steps])
        assert done - saved <= save_steps, f"{done - saved} steps to repeat, saved every {save_steps}"
        last = folder / "checkpoints" / "last.pth"
        since = max(began, last.stat().st_mtime) if last.exists() else began
        return Kill(subject.name, fault.where, self.runs, workers, save_steps, done, saved, max(0.0, ended - since))

    def finish_and_compare(self, subject: Subject, folder: Path) -> None:
        """Resume the job, let it finish, and assert that it ends exactly like the uninterrupted run."""
        processes = subject.start(folder, "--num_workers", self.chance.choice([0, 2]) if subject.processes == 1 else 0)
        codes = [process.wait(MINUTE) for process in processes]
        assert codes == [0] * len(codes), f"ended with {codes}: {processes[0].stderr}"
        reference = subject.reference
        assert_same_end(reference, folder)
        averages = [final(path).get("ema", {}) for path in (reference, folder)]
        assert all(bool((value == averages[1][name]).all()) for name, value in averages[0].items()), "EMA differs"
        assert sorted(losses(folder)) == list(range(1, LAST_STEP[subject.script] + 1)), "steps are missing"
        assert losses(folder) == losses(reference), "losses differ"
        assert epochs(folder) == epochs(reference), "the metrics of an epoch differ"
        results = [json.loads((path / "result.json").read_text()) for path in (reference, folder)]
        for name in ("accuracy", "best", "steps", "images_seen", "bad_steps"):
            assert results[0].get(name) == results[1].get(name), f"{name} differs"


def summary(kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """Return one row for each value of `where`, and a last row for all kills."""
    rows = []
    for place in [*sorted({kill.where for kill in kills}), "all"]:
        chosen = [kill for kill in kills if place in (kill.where, "all")]
        rows.append(
            {
                "where": place,
                "injected": len(chosen),
                "by_subject": {name: sum(kill.subject == name for kill in chosen) for name in subjects_of(kills)},
                "with_workers": sum(kill.workers > 0 for kill in chosen),
                "survived": sum(kill.survived for kill in chosen),
                "most_steps_done_again": max(kill.steps_done - kill.steps_kept for kill in chosen),
                "median_seconds_lost": statistics.median(kill.seconds_lost for kill in chosen),
                "most_seconds_lost": max(kill.seconds_lost for kill in chosen),
            }
        )
    return rows


def subjects_of(kills: Sequence[Kill]) -> list[str]:
    return sorted({kill.subject for kill in kills})


def markdown(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["summary"]:
        lost = 0 if row["survived"] == row["injected"] else "some"
        cells = [*row["by_subject"].values(), row["with_workers"], row["injected"], row["survived"], lost]
        seconds = f"{row['median_seconds_lost']:.2f}, {row['most_seconds_lost']:.2f}"
        rows.append([row["where"], *cells, row["most_steps_done_again"], seconds])
    columns = ["killed", *result["summary"][0]["by_subject"], "with workers", "all", "survived"]
    columns += ["steps of science lost", "most steps done again", "seconds of work lost: median, most"]
    intervals = f"{', '.join(map(str, SAVE_STEPS[:-1]))} or {SAVE_STEPS[-1]}"
    return (
        f"# Kills: {len(result['kills'])} in {result['runs']} runs, seed {result['setting']['seed']}\n\n"
        f"{where(result['machine'])} Saved every {intervals} steps; it took {result['took_seconds'] / 60:.1f} minutes."
        "\n\n" + make_table(columns, rows)
    )


def campaign(kills: int, seed: int) -> dict[str, Any]:
    """Run a campaign and return its record."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = Campaign(Path(folder), seed, progress)
        done.resume(kills)
    return {
        "took_seconds": time.monotonic() - began,
        "runs": done.runs,
        "summary": summary(done.kills),
        "kills": [dataclasses.asdict(kill) for kill in done.kills],
    }


def main(argv: Sequence[str] | None = None) -> int:
    words = parser(__doc__, kills=(100, "number of kills"), seed=(0, "seed of the places and times of the kills"))
    given = words.parse_args(argv)
    found = campaign(given.kills, given.seed)
    publish("kills_cpu", found, markdown, setting={"kills": given.kills, "seed": given.seed}, output=given.output)
    lost = [kill for kill in found["kills"] if not kill["survived"]]
    for kill in lost:
        progress(f"NOT SURVIVED: {kill}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
