"""Options of all programs: declared once, parsed from recipes and flags.

This package does not import torch, so that `--help` and errors about options do not wait for it.
"""

from options.run import (
    ClassifierOptions,
    EncoderOptions,
    FinetuneOptions,
    PretrainOptions,
    ProbeOptions,
    RunOptions,
    SegmentOptions,
    TransferOptions,
    default_folder,
    describe_model,
    resolve_batch,
)
from options.schema import (
    Difference,
    OptionError,
    changed,
    differences,
    flatten,
    from_dict,
    machine,
    nearest,
    option_table,
    parse,
    result,
    shape,
    show,
    to_dict,
)
