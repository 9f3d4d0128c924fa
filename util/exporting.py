"""Export a finished run to the formats of its option `export`.

Each export runs in a separate process, `python -m tools.export`, so that its errors do not affect the run.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from util.exits import EXIT_DONE, EXIT_NOT_EXPORTED
from util.extras import PROJECT

log = logging.getLogger(__name__)


def is_exported(folder: Path, name: str) -> bool:
    """Return whether the export of a format is newer than the run's result."""
    made = folder / "export" / name / "export.json"
    return made.is_file() and made.stat().st_mtime >= (folder / "result.json").stat().st_mtime


def export_run(folder: Path, formats: Sequence[str]) -> int:
    """Write the formats that are missing in `folder/export`, or older than the result of the run.

    Args:
        folder: The run folder.
        formats: Formats of tools.export.

    Returns:
        The exit code: `EXIT_DONE`, or `EXIT_NOT_EXPORTED` if an export failed.
    """
    failed = []
    for name in dict.fromkeys(formats):
        if is_exported(folder, name):
            continue
        log.info("exporting to %s", folder / "export" / name)
        words = [sys.executable, "-m", "tools.export", name, str(folder.resolve()), "--overwrite"]
        if (code := subprocess.run(words, cwd=PROJECT).returncode) != 0:
            failed.append(name)
            log.error(
                "the run in %s is complete, but its export to %s failed with exit code %d. Repeat the export with: "
                "python -m tools.export %s %s",
                *(folder, name, code, name, folder),
            )
    return EXIT_NOT_EXPORTED if failed else EXIT_DONE
