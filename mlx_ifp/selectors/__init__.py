"""Text -> scores -> selection."""
