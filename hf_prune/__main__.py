"""`python -m hf_prune ...` and `accelerate launch -m hf_prune ...`: the same command as `hf-prune ...`."""

import sys

from hf_prune.cli import main


def command() -> int:
    """Run one command, end the process group that accelerate started for it, if any, and return the exit code.

    A rank must not exit inside its group: NCCL warns, and may hang; gloo's threads may abort the process.
    """
    code = main()
    torch = sys.modules.get("torch")  # a command that never needed torch has no group to leave
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(command())
