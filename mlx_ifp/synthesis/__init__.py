"""A chat model writes data to train on."""
