"""One rank group timed without HTTP: ``python -m toolkit.engine.bench --help``. Read next: ``__main__.py``."""
