"""The check on a GPU: is every kernel right there, and how fast is it (``make gpu``)?

Each step is a module with a function ``run(settings, results)``; ``python -m benchmarks.gpu`` runs them one after the
other, each in a process of its own with a limit. Nothing beside the package, torch and transformers is imported.
"""
