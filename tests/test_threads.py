"""Models that are loaded in several threads, as by a notebook's widgets and cells."""

import subprocess
import sys

import pytest

#: In a process of its own, since what goes wrong lasts, and first imports are part of it.
PROGRAM = """
import threading
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.families import loading
from dreambooth_lib.training import memory_estimate, validation

config = TrainConfig(bundled_subjects()[0])
loads = [
    lambda: loading.load_model("toybox"),
    lambda: validation.load_scorers(config),
    lambda: loading.load_model("toybox"),
    lambda: memory_estimate.estimate(config),
]
for again in range(3):
    together, errors = threading.Barrier(len(loads)), []

    def run(load):
        together.wait()
        try:
            load()
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=run, args=[load]) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
for load in loads:
    load()
"""


@pytest.mark.slow
def test_models_can_be_loaded_in_threads() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
