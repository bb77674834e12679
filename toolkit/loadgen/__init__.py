"""The load generator: processes that sweep load points over any OpenAI-compatible server and prove their own accuracy.

Reading order: README.md beside this file, then ``options`` (what can be asked), ``sweep`` (points and files),
``worker`` (one process), ``sockets`` (where stamps come from), ``answers`` (what was in the bytes).
"""
