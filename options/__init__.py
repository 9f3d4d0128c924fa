"""Every option of every command: declared once, read from recipes and flags, without importing torch.

`--help` and the message for a wrong flag must not wait for torch, so neither this package nor what it imports needs it.
"""

from options.run import (
    ClassifierOptions,
    EncoderOptions,
    FinetuneOptions,
    PretrainOptions,
    ProbeOptions,
    RunOptions,
    SegmentOptions,
    resolve_batch,
)
from options.schema import (
    Difference,
    OptionError,
    differences,
    from_dict,
    machine,
    nearest,
    option_table,
    parse,
    result,
    shape,
    to_dict,
)

__all__ = [
    "ClassifierOptions",
    "Difference",
    "EncoderOptions",
    "FinetuneOptions",
    "OptionError",
    "PretrainOptions",
    "ProbeOptions",
    "RunOptions",
    "SegmentOptions",
    "differences",
    "from_dict",
    "machine",
    "nearest",
    "option_table",
    "parse",
    "resolve_batch",
    "result",
    "shape",
    "to_dict",
]
