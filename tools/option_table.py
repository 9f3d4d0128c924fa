"""The README's table of options, made from the schema.

    python -m tools.option_table            # prints the table
    python -m tools.option_table --write    # puts it between the markers in README.md

Terms bring options of their own, in their papers' files; they follow those of the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import methods
from options import FinetuneOptions, PretrainOptions, ProbeOptions, SegmentOptions, option_table

PROJECT = Path(__file__).resolve().parent.parent

BEGIN, END = "<!-- options:begin -->\n", "<!-- options:end -->\n"
COMMAND = "python -m tools.option_table --write"


def table() -> str:
    """Every option of pretraining, and of every term; then what the other commands have beside those."""
    parts = [option_table(PretrainOptions, {name: term.Options for name, term in methods.TERMS.items()})]
    commands = {
        "main_finetune.py": FinetuneOptions,
        "main_linprobe.py": ProbeOptions,
        "main_segment.py": SegmentOptions,
    }
    for command, schema in commands.items():
        parts.append(f"`{command}` has these beside those, or with another default:\n")
        parts.append(option_table(schema, beside=PretrainOptions))
    return "\n".join(parts)


def filled(text: str) -> str:
    """`text` with the present table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected the lines {BEGIN.strip()} and {END.strip()} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's table of options, made from the schema.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args(argv).write:
        readme = PROJECT / "README.md"
        readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
