"""What a decode step reads: a selector picks pages for each KV head, and the kernels read these and no others.

- ``base``: what a selector is.
- ``selectors/``: one file a selector.
- ``registry``: selectors by name.
- ``budget``: how many pages a step reads.
- ``summaries``: what is kept of each page to score it by.
- ``picked``: the picked pages as kernels read them.
- ``reader``: all of this for one layer.
- ``anchors``: which layers choose for others (Kascade).
"""
