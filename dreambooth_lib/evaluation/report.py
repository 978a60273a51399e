"""The paper's evaluation from start to end: base against tuned runs, and what is said of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.evaluation import dreambench, scores, tables
from dreambooth_lib.evaluation.dreambench import Benchmark, Progress, Protocol
from dreambooth_lib.figures import image_grids
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training.sampling import inference_settings

#: What lies in the evaluation's folder at its end.
FILES = ("scores.csv", "report.md", "best_median_worst.png")


def base_against_tuned(
    benchmark: Benchmark,
    config: Callable[[Subject], TrainConfig],
    out: Path,
    encoders: Sequence[str | Path],
    base: str = "toybox",
    pictures: int = 4,
) -> Iterator[Progress]:
    """Train, draw and score whatever is not in ``out`` yet; yields after each batch drawn.

    ``pictures`` are drawn of each prompt, as ``base`` needs them. A stopped evaluation goes on.
    Under ``accelerate launch`` all processes train each subject together and then share out the
    subjects to draw; the first one scores and writes :data:`FILES`, the last by the first encoder.
    """
    from dreambooth_lib.core.files import replace_file, save_png

    state, runs, own = join_group(), out / "runs", inference_settings(base)
    protocol = Protocol(pictures, steps=own.fewest_steps, guidance_scale=own.guidance_scale)
    train = dreambench.tuned(runs, config)
    methods: dict[str, dreambench.Method] = {"base": lambda subject: base, "dreambooth": train}
    for subject in benchmark.subjects:
        if state.is_main_process:
            dreambench.started(runs, config, subject)
        state.wait_for_everyone()
        train(subject)
    rank, processes = state.process_index, state.num_processes
    yield from dreambench.draw_all(benchmark, methods, out, protocol, rank, processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    judges = {Path(name).name: Encoder(name) for name in encoders}
    rows = list(scores.score(benchmark, methods, out, judges, protocol))
    tables.write_csv(rows, out / "scores.csv")
    table = tables.markdown(scores.means(rows), published=base != "toybox")
    replace_file(out / "report.md", table.encode())
    best = scores.pictures_by(rows, "dreambooth", next(iter(judges)), benchmark, out)
    save_png(image_grids.extremes(best), out / "best_median_worst.png")
