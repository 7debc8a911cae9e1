"""The caches that users build, over the layers of a model."""
