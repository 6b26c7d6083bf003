"""Fine-tuning: losses, which parts learn, low-rank adapters, and one jitted step."""
