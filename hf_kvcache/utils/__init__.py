"""What knows nothing of caches: registries, checks of arguments, files, the machine."""
