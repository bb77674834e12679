"""The whole experiment as frozen dataclasses: every config key, its default, its one-line help and its type.

A module for each group of keys, as in conf/: ``model.py``, ``parallel.py``, ``engine.py``, ``deploy.py``,
``health.py``, ``cluster.py``, ``load.py``; ``experiment.py`` puts them together. What Hydra composed becomes an
``ExpConfig`` (``compose.py``, ``mapping.py``), and what depends on other keys is filled in (``resolve.py``).
Nothing here knows Slurm, torch or the engine: relations between degrees and model shapes are checked by
``engine/arch_check.py`` and ``launch/check.py``. Read next: ``launch/plan.py``.
"""
