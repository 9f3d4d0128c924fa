"""Kill real training processes over and over, and hold where they end against runs that nobody disturbed.

    python -m tests.faults.campaign --kills 100 --seed 0

Pretraining (with NoR-MAE, and with DINO's views, teacher and centre), fine-tuning and linear probes of a small model on
few images are killed (SIGKILL) a few times each, at
places and moments drawn from the seed, with and without loading workers and with several intervals of saving, and
started again with the same command. A kill is survived when the run it struck ends with the weights, the optimizer's
state, every step's loss and every accuracy of the undisturbed run, bit for bit; when the newest checkpoint loaded after
the kill; when no more steps were done again than lie between two saves; and when no line of the records was lost.
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

from benchmarks.measure import parser, progress, publish, table, where
from tests.faults import inject
from tests.faults.few import CLASSIFIER, LAST_STEP, few
from tests.runs import Training, assert_same_end, final, finish, losses, metrics, start_ranks, tiny_for

PRETRAIN, FINETUNE, PROBE = "main_pretrain", "main_finetune", "main_linprobe"
NAMES = {PRETRAIN: "pretraining", FINETUNE: "fine-tuning", PROBE: "linear probe"}
PROGRAMS = ((PRETRAIN, 1), (FINETUNE, 1), (PROBE, 1), (PRETRAIN, 2))  # with the number of processes
DINO = "--out_dim 32 --head_hidden_dim 16 --head_bottleneck_dim 8 --local_crops 2 --local_size 4".split()
SAVE_STEPS = (1, 2, 3)
KILLS_A_RUN = (3, 8)  # at least and at most
MINUTE = 60.0
LAUNCHER_SECONDS = 10.0  # after which a launcher ends those that wait for a dead process


@dataclass(frozen=True)
class Subject:
    """What is killed: a program, its arguments, its number of processes, and the end of its undisturbed run."""

    door: str
    words: Sequence[object]
    processes: int
    whole: Path
    seconds: float
    method: str = ""

    @property
    def name(self) -> str:
        method = f" of {self.method}" if self.method else ""
        return NAMES[self.door] + method + (f", {self.processes} processes" if self.processes > 1 else "")

    def start(self, folder: Path, *words: object, fault: Callable[[], None] | None = None) -> list[Training]:
        if self.processes > 1:
            return start_ranks(self.processes, folder, *self.words, *words, door=self.door)
        tiny = not self.method  # or these options are among its words
        return [Training(folder, *self.words, *words, door=self.door, tiny=tiny, fault=fault)]


@dataclass
class Kill:
    """One injected fault and its cost. `survived` is known when the run has ended."""

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
class Blow:
    """How a life is to end: a fault that the process carries, or what is done to it from outside."""

    where: str
    fault: Callable[[], None] | None = None
    strike: Callable[[list[Training]], None] | None = None


def draw(chance: random.Random, subject: Subject, at: int) -> Blow:
    """A place and a moment for a run that stands at step `at`."""
    if subject.processes > 1:
        return Blow("one of two processes", strike=partial(after_step, chance, at))
    left = subject.seconds * (1 - at / LAST_STEP[subject.door])
    places: dict[str, Callable[[], Blow]] = {
        "a random moment": lambda: Blow("", strike=partial(after_seconds, chance.uniform(0, left))),
        "a random step": lambda: Blow("", strike=partial(after_step, chance, at)),
        "inside a save": lambda: Blow("", partial(inject.killed_inside_save, chance.randint(1, 3), chance.random())),
        "at a rename": lambda: Blow("", partial(inject.killed_at_rename, chance.randint(1, 8), chance.random() < 0.5)),
        "inside an evaluation": lambda: Blow(
            "", partial(inject.signals_inside_evaluation, chance.randint(1, 3), signal.SIGKILL)
        ),
        "before a line of the records": lambda: Blow("", partial(inject.killed_before_line, chance.randint(1, 6))),
        "inside a line of the records": lambda: Blow("", partial(inject.killed_inside_line, chance.randint(1, 6))),
    }
    where = chance.choice(list(places))
    return dataclasses.replace(places[where](), where=where)


def after_seconds(seconds: float, processes: list[Training]) -> None:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it was over before
        processes[0].send(signal.SIGKILL)


def after_step(chance: random.Random, at: int, processes: list[Training]) -> None:
    """A few steps on, and somewhere within the step that follows."""
    victim = chance.choice(processes)
    if processes[0].reaches(at + chance.randint(1, 5)):
        after_seconds(chance.uniform(0, 0.03), [victim])


def as_a_launcher(lives: list[Training]) -> None:
    """Wait for the end of all processes; those that still wait for a dead one after a while are ended."""
    deadline = time.monotonic() + MINUTE
    while not all(life.is_over for life in lives):
        if any(life.is_over for life in lives):
            deadline = min(deadline, time.monotonic() + LAUNCHER_SECONDS)
        if time.monotonic() > deadline:
            for life in lives:
                after_seconds(0, [life])
        time.sleep(0.02)


def kept_step(folder: Path) -> int:
    """The step of the newest checkpoint, which must load; 0 where there is none yet."""
    return final(folder)["step"] if (folder / "checkpoints" / "last.pth").exists() else 0


def epochs(folder: Path) -> dict[int, dict[str, Any]]:
    """What log.txt says of each epoch, whichever start of the run wrote it last."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return {line["epoch"]: {name: value for name, value in line.items() if name != "run_id"} for line in lines}


def complete_lines(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    return path.read_text().rpartition("\n")[0] if path.exists() else ""


class Campaign:
    """Runs that are killed until enough blows have struck."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.chance = random.Random(seed)
        self.kills: list[Kill] = []
        self.runs = 0
        self.subjects = self._subjects()

    def _subjects(self) -> list[Subject]:
        """The undisturbed runs. Pretraining evaluates nearest neighbours after every epoch."""
        plain = few()
        doors = {PRETRAIN: [*plain, "--knn_every", 1]}
        trained = ["--init_from", self.folder / "whole" / f"{PRETRAIN}1" / "checkpoints" / "last.pth"]
        doors[FINETUNE] = [*plain, *CLASSIFIER, *trained, "--ema", 0.9]
        doors[PROBE] = [*plain, *CLASSIFIER, *trained]
        dino = [*tiny_for("dino"), *doors[PRETRAIN], "--method", "dino", *DINO]
        finish(self.folder / "first", *plain)  # so that no other waits for its imports
        found = []
        kinds = [(door, doors[door], processes, "") for door, processes in PROGRAMS] + [(PRETRAIN, dino, 1, "DINO")]
        for door, words, processes, method in kinds:
            whole = self.folder / "whole" / f"{door}{processes}{method}"
            subject = Subject(door, words, processes, whole, 0.0, method)
            began = time.monotonic()
            codes = [process.wait() for process in subject.start(whole)]
            assert codes == [0] * processes, codes
            found.append(dataclasses.replace(subject, seconds=time.monotonic() - began))
            self.say(f"undisturbed: {found[-1].name}, {found[-1].seconds:.1f} s")
        return found

    def resume(self, kills: int) -> None:
        """Kill runs until there were `kills` kills: mostly pretraining and fine-tuning, in turn one of the others."""
        pretrain, finetune, *others = self.subjects
        while len(self.kills) < kills:
            other = others[(self.runs // 3) % len(others)]
            self.run([pretrain, finetune, other][self.runs % 3], kills - len(self.kills))

    def run(self, subject: Subject, most: int) -> None:
        """One run from its start to its end, killed on the way as often as `most` allows."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        struck: list[Kill] = []
        try:
            for _ in range(min(most, self.chance.randint(*KILLS_A_RUN))):
                kill = self.live(subject, folder)
                if kill is None:  # the run ended before the blow
                    break
                struck.append(kill)
            self.bring_to_an_end(subject, folder)
        except (AssertionError, ValueError) as error:  # ValueError: a checkpoint that does not load
            struck = struck or [Kill(subject.name, "the first start", self.runs, 0, 0, 0, 0, 0.0)]
            for kill in struck:
                kill.trouble = str(error)[:2000] or "another end"
        else:
            for kill in struck:
                kill.survived = True
        self.kills += struck
        self.say(f"run {self.runs}, {subject.name}: {len(struck)} kills; {len(self.kills)} in all")

    def live(self, subject: Subject, folder: Path) -> Kill | None:
        """One life of a process and its end; None when it reached the end of the run."""
        workers = self.chance.choice([0, 0, 2]) if subject.processes == 1 else 0
        save_steps = self.chance.choice(SAVE_STEPS)
        kept, before = kept_step(folder), complete_lines(folder)
        blow = draw(self.chance, subject, max([kept, *losses(folder)]))
        began = time.time()
        lives = subject.start(folder, "--num_workers", workers, "--save_steps", save_steps, fault=blow.fault)
        if blow.strike is not None:
            blow.strike(lives)
            as_a_launcher(lives)
        codes = [life.wait(MINUTE) for life in lives]
        if codes == [0] * len(codes):
            return None
        said = "\n".join(life.said for life in lives)
        assert -signal.SIGKILL in codes, f"ended with {codes}: {said}"
        ended = time.time()
        assert complete_lines(folder).startswith(before), "a line of the records was lost"
        again = kept_step(folder)  # loads, or says why not
        assert again >= kept, f"a checkpoint of step {kept} was there, now {again}"
        mine = [line["step"] for line in metrics(folder)[before.count("\n") + bool(before) :]]
        done = max([again, *mine])
        assert done - again <= save_steps, f"{done - again} steps to do again, saved every {save_steps}"
        last = folder / "checkpoints" / "last.pth"
        since = max(began, last.stat().st_mtime) if last.exists() else began
        return Kill(subject.name, blow.where, self.runs, workers, save_steps, done, again, max(0.0, ended - since))

    def bring_to_an_end(self, subject: Subject, folder: Path) -> None:
        lives = subject.start(folder, "--num_workers", self.chance.choice([0, 2]) if subject.processes == 1 else 0)
        codes = [life.wait(MINUTE) for life in lives]
        assert codes == [0] * len(codes), f"ended with {codes}: {lives[0].said}"
        whole = subject.whole
        assert_same_end(whole, folder)
        averages = [final(path).get("ema", {}) for path in (whole, folder)]
        assert all(bool((value == averages[1][name]).all()) for name, value in averages[0].items()), "another average"
        assert sorted(losses(folder)) == list(range(1, LAST_STEP[subject.door] + 1)), "steps are missing"
        assert losses(folder) == losses(whole), "losses differ"
        assert epochs(folder) == epochs(whole), "an epoch's figures differ"
        figures = [json.loads((path / "result.json").read_text()) for path in (whole, folder)]
        for name in ("accuracy", "best", "steps", "images_seen", "bad_steps"):
            assert figures[0].get(name) == figures[1].get(name), f"{name} differs"


def summary(kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """A row for each place of the blow, and one for all."""
    rows = []
    for place in [*sorted({kill.where for kill in kills}), "all"]:
        mine = [kill for kill in kills if place in (kill.where, "all")]
        rows.append(
            {
                "where": place,
                "injected": len(mine),
                "by_subject": {name: sum(kill.subject == name for kill in mine) for name in subjects_of(kills)},
                "with_workers": sum(kill.workers > 0 for kill in mine),
                "survived": sum(kill.survived for kill in mine),
                "most_steps_done_again": max(kill.steps_done - kill.steps_kept for kill in mine),
                "median_seconds_lost": statistics.median(kill.seconds_lost for kill in mine),
                "most_seconds_lost": max(kill.seconds_lost for kill in mine),
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
        "\n\n" + table(columns, rows)
    )


def campaign(kills: int, seed: int) -> dict[str, Any]:
    """The record of a whole campaign."""
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
    words = parser(
        __doc__, kills=(100, "how many blows must strike"), seed=(0, "decides places and moments of the blows")
    )
    given = words.parse_args(argv)
    found = campaign(given.kills, given.seed)
    publish("kills_cpu", found, markdown, setting={"kills": given.kills, "seed": given.seed}, output=given.output)
    lost = [kill for kill in found["kills"] if not kill["survived"]]
    for kill in lost:
        progress(f"NOT SURVIVED: {kill}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
