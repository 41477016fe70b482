"""Tools that serve every part of the package and know none: files, settings, the machine, folders as registries."""
