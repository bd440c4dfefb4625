"""The checkpoint format: finding, checking, reading and writing a directory."""
