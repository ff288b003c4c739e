"""What looks at, trains and evaluates decodes: the command line and what it stands on."""
