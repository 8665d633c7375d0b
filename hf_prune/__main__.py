"""`python -m hf_prune ...` and `accelerate launch -m hf_prune ...`: the same command as `hf-prune ...`."""

import sys

from hf_prune.cli import main


def _leave_process_group() -> None:
    """End the process group that accelerate started, if any: NCCL warns, and may hang, when a rank exits inside it."""
    torch = sys.modules.get("torch")  # a command that never needed torch has no group to leave
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    _leave_process_group()
    sys.exit(code)
