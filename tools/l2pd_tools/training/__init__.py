"""Recording decodes for training filters."""
