"""Parts that know nothing of caches: registries, checks of arguments, files, the machine."""
