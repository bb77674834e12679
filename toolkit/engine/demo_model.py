"""Builds the demo model: SmolLM2-135M-Instruct as a Mixtral-format MoE with a real, uneven expert load.

    python -m toolkit.engine.demo_model [--out DIR] [--experts 8] [--top-k 2] [--skew 3.0] [--prompts FILE] [--force]

Every FFN becomes E equal experts behind a fitted gate, and Mixtral's top-k weights sum to one. So the model's text
is the dense model's, whatever the routing, while the expert load is that of a skewed MoE.
Owns the command line and the steps of a build. A folder appears whole, or not at all.
Read next: ``demo_gguf.py`` (the source), ``demo_gate.py`` (the fit), ``demo_checkpoint.py`` (the files).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import track

from toolkit.cache import CACHE_ENV, cache_dir
from toolkit.engine.demo_report import FIT_FILE, fit_table, gate_report, readme

if TYPE_CHECKING:
    import torch

    from toolkit.engine.demo_gate import LayerFit
    from toolkit.engine.demo_gguf import DenseModel

T = TypeVar("T")

NAME = "smollm2-moe"
PROMPTS = Path(__file__).parents[1] / "loadgen" / "datasets" / "prompts.jsonl"
HELD_OUT = 4  # every fourth prompt only measures
MAX_PROMPT_TOKENS = 512
MAX_TOKENS = 8192  # of all prompts; more would only cost time and memory
MIN_TOKENS = 256  # fewer, of the fitted prompts, do not determine a gate


@dataclass(frozen=True)
class Settings:
    """What makes one demo model differ from another. ``version`` grows when a build gives other files."""

    experts: int = 8
    top_k: int = 2
    skew: float = 3.0
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k < self.experts:
            raise ValueError(f"--top-k={self.top_k} must be at least 1 and less than --experts={self.experts}")
        # an expert that every token takes has E / K times the mean; short of that the fit still has room
        ceiling = 0.9 * self.experts / self.top_k
        if not 1 <= self.skew <= ceiling:
            raise ValueError(
                f"--skew={self.skew} (hottest expert over mean) must be between 1 and {ceiling:g}, "
                f"0.9 * {self.experts} experts / top {self.top_k}: use less skew or more experts"
            )


def default_out() -> Path:
    return cache_dir() / NAME


def build(
    out: Path,
    settings: Settings = Settings(),
    prompts: Path = PROMPTS,
    force: bool = False,
    console: Console | None = None,
) -> Path:
    """Makes the folder ``out`` unless it is there already, and returns it. Safe to call from several processes.

    Raises:
        ValueError: a package is missing, the prompts are unusable, or ``out`` holds something else.
    """
    console = console or Console()
    out = out.expanduser().absolute()
    if _is_there(out, settings, force):  # before the lock: the folder may be in a cache that is read-only to us
        console.print(f"demo model: {out} (already built)", soft_wrap=True)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(out, console) as waited:
        if waited and _is_there(out, settings, force=False):
            console.print(f"demo model: {out} (built by another process)", soft_wrap=True)
            return out
        part = out.with_name(f".{out.name}.building")  # the lock makes it ours; what a killed build left goes
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            _fill(part, settings, prompts, console)
            if out.exists():
                shutil.rmtree(out)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    console.print(f"demo model: {out}", soft_wrap=True)
    return out


def _is_there(out: Path, settings: Settings, force: bool) -> bool:
    """True when ``out`` is the model asked for; ``ValueError`` when something that is not ours stands there."""
    from toolkit.engine.demo_checkpoint import missing_files

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / FIT_FILE).is_file():
        raise ValueError(f"--out={out} exists and is not a demo model: choose another folder, or move it away")
    if force:
        return False
    if missing := missing_files(out):
        raise ValueError(f"--out={out} lacks {', '.join(missing)}: use --force to build it again")
    found = json.loads((out / FIT_FILE).read_text())["settings"]
    if found != asdict(settings):
        raise ValueError(
            f"--out={out} holds another demo model ({found}, asked for {asdict(settings)}): "
            "use --force to replace it, or another --out"
        )
    return True


@contextlib.contextmanager
def _only_builder(out: Path, console: Console) -> Iterator[bool]:
    """Holds a lock beside ``out``; the kernel drops it when the process ends, however it ends.

    Yields whether another builder had it first.
    """
    waited = False
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"another process is building {out}, waiting for it", soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            waited = True
        yield waited


def _fill(folder: Path, settings: Settings, prompts: Path, console: Console) -> None:
    """Writes the whole model into the empty ``folder``."""
    from toolkit.engine import demo_checkpoint as checkpoint
    from toolkit.engine import demo_gguf

    source = demo_gguf.find_gguf()
    console.print(f"reading SmolLM2-135M-Instruct from {source}", soft_wrap=True)
    model = demo_gguf.read_dense(source)
    checkpoint.write_config(folder, model.config, settings.experts, settings.top_k)
    checkpoint.write_tokenizer(folder, model.tokenizer, model.config)
    token_ids = read_prompts(prompts, folder)
    fit, held_out = _activations(model, token_ids, console)
    fits = _fit(fit, held_out, settings, console)
    report = gate_report(
        fits,
        asdict(settings),
        {
            "file": prompts.name,
            "prompts": len(token_ids),
            "fit_tokens": fit.shape[1],
            "held_out_tokens": held_out.shape[1],
        },
    )
    console.print(fit_table(report))

    shards = checkpoint.plan_shards(model.weights, [layer.gate_ED for layer in fits], settings.experts)
    needed = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    if shutil.disk_usage(folder).free < needed:
        raise ValueError(
            f"{folder.parent} has less than the {needed / 1e9:.1f} GB free that the demo model takes: "
            f"free some, or choose another place with --out or {CACHE_ENV}"
        )
    for shard in _stage(console, f"writing {needed / 1e9:.1f} GB of weights", shards):
        checkpoint.write_shard(folder, shard)
    checkpoint.write_index(folder, shards)
    (folder / FIT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    (folder / "README.md").write_text(readme(report))


def read_prompts(path: Path, tokenizer_folder: Path) -> list[list[int]]:
    """Token ids of the prompts in a JSON-lines file of {"messages": [...]} or {"prompt": "..."}."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prompts: list[list[int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or sum(map(len, prompts)) > MAX_TOKENS:
            continue
        try:
            entry = json.loads(line)
            text = entry.get("prompt") or tokenizer.apply_chat_template(
                entry["messages"], tokenize=False, add_generation_prompt=True
            )
            prompts.append(tokenizer.encode(text, add_special_tokens=False)[:MAX_PROMPT_TOKENS])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--prompts={path}, line {number}: {error!r}; a line is a JSON object with `messages`, or with `prompt`"
            ) from None
    if len(prompts) < 2 * HELD_OUT:
        raise ValueError(f"--prompts={path} has {len(prompts)} prompts: at least {2 * HELD_OUT} are needed")
    return prompts


def _activations(model: DenseModel, prompts: list[list[int]], console: Console) -> tuple[torch.Tensor, torch.Tensor]:
    """What the FFNs see, [layers, tokens, hidden]: of the prompts to fit, and of those held out."""
    import torch

    from toolkit.engine.demo_gate import moe_inputs, new_positions

    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    inputs = zip(moe_inputs(model.config, model.weights, prompts), new_positions(prompts), strict=True)
    stage = _stage(console, f"running the dense model over {len(prompts)} prompts", inputs, len(prompts))
    for i, (x_LTD, positions) in enumerate(stage):
        parts[i % HELD_OUT == HELD_OUT - 1].append(x_LTD[:, positions])
    fit, held_out = (torch.cat(part, dim=1) for part in parts)
    if fit.shape[1] < MIN_TOKENS or not held_out.shape[1]:
        raise ValueError(
            f"--prompts: after shared prefixes there are {fit.shape[1]} tokens to fit to and {held_out.shape[1]} held "
            f"out; at least {MIN_TOKENS} and 1 are needed: add prompts"
        )
    return fit, held_out


def _fit(fit: torch.Tensor, held_out: torch.Tensor, settings: Settings, console: Console) -> list[LayerFit]:
    from toolkit.engine.demo_gate import fit_layer, zipf_load

    target = zipf_load(settings.experts, settings.skew)
    layers = _stage(console, f"fitting {len(fit)} gates to {fit.shape[1]} tokens", range(len(fit)))
    return [fit_layer(fit[i], held_out[i], target, settings.top_k, seed=i) for i in layers]


def _stage(console: Console, what: str, items: Sequence[T] | Iterator[T], total: int | None = None) -> Iterator[T]:
    """A progress bar in a terminal, one line elsewhere."""
    if not console.is_terminal:
        console.print(what)
    yield from track(items, what, total, console=console, disable=not console.is_terminal)


# --- command line -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.engine.demo_model",
        description="Builds the demo model, SmolLM2-135M-Instruct as a Mixtral-format MoE, once, and says where.",
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, default=default_out(), help="folder to make (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=defaults.experts, help="experts a layer (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="experts a token (default: %(default)s)")
    parser.add_argument(
        "--skew",
        type=float,
        default=defaults.skew,
        help="load of the hottest expert over the mean (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        help="JSON lines the gates are fitted on (default: the bundled prompts)",
    )
    parser.add_argument("--force", action="store_true", help="build again even if the folder is there")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no half-built folder stays
    try:
        build(args.out, Settings(args.experts, args.top_k, args.skew), args.prompts, args.force)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
