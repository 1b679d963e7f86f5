"""What is checked and said before a run begins: the plan, room on the disk, room in memory."""

from pathlib import Path

from convert.errors import ResourceError
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place
from quant.estimate import GIB, Plan
from quant.memory import memory_available_bytes, memory_limit_bytes
from quant.progress import Progress
from quant.session import Session


def announce(session: Session, plan: Plan, out: Path) -> None:
    """Say what the run takes, and check that there is room for it.

    Raises InputError where `out` cannot be an output folder of this model, ResourceError where disk or memory cannot hold the run.
    """
    check_output_place(out, session.checkpoint.path)
    for text in (*notes_of(session), *plan.lines()):
        session.progress.say(text)
    check_free_space(out, plan.disk_bytes, f"quantize {plan.command}")
    check_memory(plan, session.progress)


def notes_of(session: Session) -> list[str]:
    """Remarks of the checkpoint, as they are said."""
    return [f"note: {note}" for note in session.checkpoint.notes]


def check_memory(plan: Plan, progress: Progress) -> None:
    """Raises ResourceError where this machine (or its container) never had the memory; warns where it has it not now."""
    if not plan.device.startswith("cpu"):
        return
    limit, available = memory_limit_bytes(), memory_available_bytes()
    if limit is not None and plan.peak_bytes > limit:
        raise ResourceError(
            f"the run needs about {plan.peak_bytes / GIB:.1f} GiB, but this machine or container has {limit / GIB:.1f} GiB in all. "
            f"Use fewer --samples or a smaller --seqlen, or give text (--calib-data) where the model would write its own."
        )
    if available is not None and plan.peak_bytes > available:
        progress.warn(
            f"about {plan.peak_bytes / GIB:.1f} GiB are needed and {available / GIB:.1f} GiB are free: it may run out."
        )
