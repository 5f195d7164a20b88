"""The flags about how a run ends before its time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EndingArguments:
    """How long a run that is asked to stop, or stands still, is waited for."""

    save_on_signal_timeout: float = field(
        default=25.0,
        metadata={
            "help": "Seconds to finish the step and save a checkpoint when SIGTERM, SIGUSR1 or SIGHUP asks the run to "
            "stop; 0 ends it at once, without saving. Give the scheduler a longer notice than that."
        },
    )
    hang_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds without a finished micro-batch, evaluation batch or save after which every rank writes "
            "its stacks and the samples of the step into OUTPUT_DIR/hang and the run ends; 0: never."
        },
    )
