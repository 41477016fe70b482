"""What serves every part of the package and knows none: files, settings, the machine, folders as registries."""
