"""From the authors' checkpoints to ours."""
