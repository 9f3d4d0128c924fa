"""Keep the results of a comparison's runs without their weights, so that another machine can continue it.

tar -C OUT -xf benchmarks/results/leaderboard_cpu_runs.tar.xz    # before scripts/leaderboard.sh with this OUT
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tools.table_jobs import Job, say
from util import checkpoint

KEPT = ("result.json", "environment.json")


def pack(root: Path, jobs: Sequence[Job], path: Path) -> None:
    """Write the results and environments of all finished jobs in `root` to an archive."""
    with tarfile.open(path, "w:xz") as archive:
        for job in jobs:
            for file in (job.done.parent / name for name in KEPT if job.done.name == KEPT[0] and job.done.exists()):
                if file.exists():
                    archive.add(file, file.relative_to(root))


def drop_needed_without_weights(jobs: Sequence[Job]) -> None:
    """Delete runs that came from an archive and whose weights an unfinished job needs; they are trained again."""
    done = {path for job in jobs if not job.done.exists() for path in job.after if path.name == KEPT[0]}
    needed = {path for path in done if path.exists() and not (path.parent / "checkpoints" / checkpoint.LAST).exists()}
    for path in needed:
        say(f"{path.parent}: trained again, because its weights are not here")
        shutil.rmtree(path.parent)
    if needed:
        drop_needed_without_weights(jobs)  # what these runs need themselves
