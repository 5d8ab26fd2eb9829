"""What a run shows and keeps, beside its numbers: progress bar and picture sheets."""
