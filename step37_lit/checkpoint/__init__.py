"""Checkpoints as folders: format and verification, without parallel state (that is `step37_lit.megatron.saver`)."""
