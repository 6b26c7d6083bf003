"""Fine-tuning: the run config, batches, losses, the training step, checkpoints and the trainer."""
