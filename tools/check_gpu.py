"""Which ways of training work on this machine: ``python -m tools.check_gpu --work DIR``.

Each way trains the bundled base, stops in the middle as if it were interrupted, is resumed, ends,
and draws from what it saved, in a process of its own, five at a time. ``make gpu`` does this too.
A way is ok where every loss is finite, the loss on held-out pictures falls, no update is lost or
made twice, and the finished run and its best checkpoint load and draw. What was ok in DIR is not
done again.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dreambooth_lib.core.files import replace_file

STEPS, STOP = 40, 23  # updates of a run, and those before it is interrupted
AT_ONCE = 5
LIMIT = 180.0  # seconds of one way
_LORA: dict[str, Any] = {"method": "lora", "lora_rank": 8}
_BF16, _FP16 = {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}

#: What the GPUs that people have compute in comes first.
WAYS: dict[str, dict[str, Any]] = {
    "full model, default settings": {},
    "full model, fp16": _FP16,
    "LoRA, fp16": _LORA | _FP16,
    "LoRA low, fp16": _LORA | _FP16 | {"memory": "low"},
    "full model low, fp16": _FP16 | {"memory": "low"},
    "QLoRA nf4, fp16": _LORA | _FP16 | {"quantize": "nf4"},
    "with text encoder, fp16": _FP16 | {"train_text_encoder": True},
    "LoRA with a new token, fp16": _LORA | _FP16 | {"train_token": True},
    "distilled prior, fp16": _FP16 | {"prior": "distilled"},
    "accumulated gradients, fp16": _FP16 | {"gradient_accumulation": 2},
    "full model, bf16": _BF16,
    "full model low, bf16": _BF16 | {"memory": "low"},
    "full model lowest, bf16": _BF16 | {"memory": "lowest"},
    "full model lowest, fp16": _FP16 | {"memory": "lowest"},
    "DoRA, bf16": _LORA | _BF16 | {"dora": True},
    "LoRA low with text encoder, bf16": _LORA
    | _BF16
    | {"memory": "low", "train_text_encoder": True},
    "QLoRA nf4, bf16": _LORA | _BF16 | {"quantize": "nf4"},
    "QLoRA int8, bf16": _LORA | _BF16 | {"quantize": "int8"},
    "LoRA, distilled prior, bf16": _LORA | _BF16 | {"prior": "distilled"},
    "LoKr, fp16": _LORA | _FP16 | {"adapter": "lokr"},
    "OFT, bf16": _LORA | _BF16 | {"adapter": "oft"},
    "float32, torch's AdamW": {"mixed_precision": "no", "optimizer": "adamw"},
}


def check(name: str, folder: Path, tiny: bool) -> str:
    """Train, interrupt, resume and draw in one way; says how it went. Raises what goes wrong."""
    import numpy as np

    import dreambooth_lib as db
    from dreambooth_lib.families.loading import BUNDLED

    shutil.rmtree(folder, ignore_errors=True)
    fields = {
        "steps": STEPS, "validate_every": STEPS // 2, "class_images": 8,
        "prior_inference_steps": 10, "checkpoint_every": STEPS // 4,
    } | WAYS[name]  # fmt: skip
    if tiny:  # a CPU computes in float32, and quantizing needs a GPU
        fields |= {"base": _tiny(folder / "base"), "resolution": 16, "scorer": "toybox",
                   "mixed_precision": "no", "quantize": None, "learning_rate": 3e-3}  # fmt: skip
    identifier = "<patch-dog>" if fields.get("train_token") else "ohwx"  # new to the base, or rare
    subject = db.load_subject(str(BUNDLED / "subjects" / "patch_dog"), "dog", identifier)
    made = []
    run = db.start(db.TrainConfig(subject=subject, **fields), folder / "run")
    for step in db.train(run):
        made.append(step)
        if step.step == STOP:
            break
    run = db.resume(folder / "run")
    made += db.train(run)
    if [step.step for step in made] != list(range(1, STEPS + 1)):
        raise RuntimeError(f"it made the updates {[step.step for step in made]}")
    if not all(math.isfinite(step.loss) for step in made):
        raise RuntimeError("a loss is not finite")
    before, *_, after = (fmean(row.held_out["subject"]) for row in db.history(run))
    if not after < before:
        raise RuntimeError(f"the loss on held-out pictures went from {before:.4f} to {after:.4f}")
    for at in (None, db.best_checkpoint(run).step):
        (drawn,) = db.sample(run, ["a {} dog on the beach"], [0], at=at, steps=10)
        if np.asarray(drawn.image).std() < 5:
            raise RuntimeError(f"what it draws {'at its end' if at is None else at} is empty")
    seconds, memory = median(step.seconds for step in made[STOP:]), made[-1].memory_mb
    peak = "" if memory is None else f", {memory:.0f} MiB"
    return f"loss {before:.4f} to {after:.4f}, {1000 * seconds:.0f} ms a step{peak}"


def _tiny(place: Path) -> str:
    """Return a tiny random base in place of the embedded one; its path."""
    from tools import architectures

    architectures.save(architectures.ALL["sd15"], place, tiny=True)
    return str(place)


def run(work: Path, names: Sequence[str], tiny: bool = False, until: float = math.inf) -> None:
    """Check ways that have not been found ok in ``work``; a line each, as soon as it is known.

    Nothing begins after the moment ``until``, and what is not done then is left to the next call.
    """
    work.mkdir(parents=True, exist_ok=True)
    found = read(work)
    left = [name for name in names if not found.get(name, {}).get("ok")]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    own = [sys.executable, "-m", "tools.check_gpu", "--work", str(work), *(["--tiny"] * tiny)]
    while running or (left and time.monotonic() < until):
        while left and len(running) < AT_ONCE and time.monotonic() < until:
            name = left.pop(0)
            file(work, name).unlink(missing_ok=True)
            with file(work, name, ".log").open("wb") as log:
                child = subprocess.Popen([*own, "--one", name], stdout=log, stderr=log)
            running[name] = child, time.monotonic()
        time.sleep(0.02)
        for name, (child, began) in list(running.items()):
            late, now = time.monotonic() > until, time.monotonic()
            if child.poll() is None and (late or now - began > LIMIT):
                child.kill()
                child.wait()
                if not late:
                    note(work, name, False, f"it took longer than {LIMIT:.0f} s")
            if child.poll() is not None:
                del running[name]
                shutil.rmtree(folder_of(work, name), ignore_errors=True)
                if child.returncode > 0 and name not in read(work):
                    note(work, name, False, last_words(work, name))
                if name in (known := read(work)):
                    print(line(name, known[name]), flush=True)


def last_words(work: Path, name: str) -> str:
    lines = file(work, name, ".log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def note(work: Path, name: str, ok: bool, told: str) -> None:
    replace_file(file(work, name), json.dumps({"name": name, "ok": ok, "told": told}).encode())


def read(work: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each way, in the order of WAYS."""
    known = [json.loads(one.read_text()) for one in sorted(work.glob("*.json"))]
    by_name = {one["name"]: one for one in known}
    return {name: by_name[name] for name in WAYS if name in by_name}


def file(work: Path, name: str, ending: str = ".json") -> Path:
    return work / f"{list(WAYS).index(name):02d}{ending}"


def folder_of(work: Path, name: str) -> Path:
    return work / f"{list(WAYS).index(name):02d}"


def line(name: str, known: dict[str, Any]) -> str:
    return f"{'ok' if known['ok'] else 'failed'}: {name}: {known['told']}"


def markdown(work: Path) -> str:
    """Return a line for each way, those not checked yet by name."""
    found = read(work)
    left = [name for name in WAYS if name not in found]
    lines = [f"- {line(name, known)}" for name, known in found.items()]
    return "\n".join([*lines, *([f"- not checked yet: {'; '.join(left)}"] * bool(left))]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--tiny", action="store_true", help="in float32 on a CPU, to try the script"
    )
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    work = given.work.resolve()
    if given.one:
        told = check(given.one, folder_of(work, given.one), given.tiny)
        note(work, given.one, True, told)
        return
    run(work, given.only, given.tiny)
    failed = [name for name, known in read(work).items() if not known["ok"]]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(given.only)} ways failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
