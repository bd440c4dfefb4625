"""Train a model: these modules have the data, the losses, the warm start and the trainer."""
