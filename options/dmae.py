"""Options of DMAE's teacher term."""

from dataclasses import dataclass

from options.schema import require_number


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher, and the blocks that are compared."""

    weight: float = 1.0
    """Weight of the term."""
    checkpoint: str = ""
    """Checkpoint of the teacher (MAE, timm or ours), with the same patch size as the student."""
    student_block: int = 0
    """Block of the student whose output is compared, counted from 1; 0: at three quarters of its depth."""
    teacher_block: int = 0
    """Block of the teacher whose output is compared, counted from 1; 0: at three quarters of its depth."""
    embed_dim: int = 0
    """Channels of the teacher; 0: from its checkpoint, as for the next two options."""
    depth: int = 0
    """Blocks of the teacher."""
    num_heads: int = 0
    """Attention heads of the teacher. Only checkpoints of this project record them; for others, 0 means the number of
    `model` at that width: 12 for 192 channels."""
    digest: str = ""
    """SHA-256 of the teacher's weights, recorded by a run so that it is not resumed with another teacher."""

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        for name in ("student_block", "teacher_block", "embed_dim", "depth", "num_heads"):
            require_number(name, getattr(self, name), 0)
