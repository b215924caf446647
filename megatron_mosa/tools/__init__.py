"""Programs for people, beside a training run."""
