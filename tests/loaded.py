"""What stands in memory before launch.py forks: a start of Python with all of this takes seconds.

It is only imported, so that a child finds no thread and nothing trained, and draws what a new process draws.
"""

import importlib

for name in ("data", "eval", "train", "tools.prepare", "tools.sample", "tools.plot", "torch._dynamo",
             "pytest", "matplotlib.figure", "matplotlib.backends.backend_agg", "tiktoken_ext.openai_public"):
    importlib.import_module(name)
