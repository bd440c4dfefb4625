"""What pruning loses: on a user's own prompts, and in lm-evaluation-harness."""
