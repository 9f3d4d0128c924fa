"""Options of DMAE's teacher term."""

from dataclasses import dataclass

from options.schema import require_number


@dataclass(frozen=True)
class TeacherOptions:
    """Who teaches, and where the two are compared."""

    weight: float = 1.0
    """Weight of the difference."""
    checkpoint: str = ""
    """The teacher: a checkpoint of MAE's, timm's or ours, with patches of the student's size."""
    student_block: int = 0
    """Block of the student, counted from 1, whose output is compared; 0: at three quarters of its depth."""
    teacher_block: int = 0
    """Block of the teacher, counted from 1, whose output is compared; 0: at three quarters of its depth."""
    embed_dim: int = 0
    """Channels of the teacher; 0: from its checkpoint, as for the two options that follow."""
    depth: int = 0
    """Blocks of the teacher."""
    num_heads: int = 0
    """Attention heads of the teacher. Only our own checkpoints tell; for others 0 means what `model` has with those
    channels, so 12 for 192 of them."""
    digest: str = ""
    """SHA-256 of the teacher's weights, which a run notes, so that it does not go on with another teacher."""

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        for name in ("student_block", "teacher_block", "embed_dim", "depth", "num_heads"):
            require_number(name, getattr(self, name), 0)
