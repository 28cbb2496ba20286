"""Training and fine-tuning, resumable at every epoch."""
