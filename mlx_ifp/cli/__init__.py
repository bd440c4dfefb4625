"""What the commands share: flags, what they mean, and how a command ends."""
