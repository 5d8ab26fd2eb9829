"""Exit codes of `python -m step37_lit`, and of a script whose `fit` a signal or the end of another rank has ended."""

USER_ERROR = 2  # one line on stderr says what to change
FAULT = 65  # a step that is not finite, or a spike; sysexits' EX_DATAERR
RANK_LOST = 69  # another rank died, hangs or failed; sysexits' EX_UNAVAILABLE
REQUEUE = 75  # SIGUSR1; sysexits' EX_TEMPFAIL: start it again
INTERRUPTED = 130  # SIGINT, as a shell counts signals
TERMINATED = 143  # SIGTERM
