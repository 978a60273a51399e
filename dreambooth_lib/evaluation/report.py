"""Run the paper's evaluation from start to end: the base against tuned runs, with a report."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import markdown
from dreambooth_lib.evaluation import dreambench, scores, tables
from dreambooth_lib.evaluation.dreambench import Benchmark, Progress, Protocol
from dreambooth_lib.evaluation.judge import RubricJudge, VisionLanguageModel
from dreambooth_lib.evaluation.measures import JUDGES
from dreambooth_lib.figures import image_grids
from dreambooth_lib.metrics.encoders import PAPER, Encoder
from dreambooth_lib.training.sampling import inference_settings
from dreambooth_lib.training.validation import TOYBOX_SCORER

#: The files that it leaves in the evaluation's folder.
FILES = ("scores.csv", "report.md", "best_median_worst.png")


def load_encoders(models: Sequence[str | Path]) -> dict[str, Encoder]:
    """Return encoders by the names that scores have of them, which tell two models apart."""
    # The bundled base's own is called as configs call it, not by its folder.
    own = {str(TOYBOX_SCORER): "toybox"}
    names = [own.get(str(model), Path(model).name) for model in models]
    if len(set(names)) < len(names):  # two of different owners
        names = [own.get(str(model), str(model)) for model in models]
    return {name: Encoder(model) for name, model in zip(names, models, strict=True)}


def base_against_tuned(
    benchmark: Benchmark,
    config: Callable[[Subject], TrainConfig],
    out: Path,
    encoders: Sequence[str | Path],
    base: str = "toybox",
    images_per_prompt: int = 4,
    judge: Callable[[], VisionLanguageModel] | None = None,
    drift_prompts: Sequence[str] = (),
) -> Iterator[Progress]:
    """Train, generate and score what is missing in ``out``; yield after each batch generated.

    Images are generated with the fewest inference steps that finish the base's. An interrupted
    evaluation resumes. Under ``accelerate launch`` all processes train each subject together and
    then split the images; the first one scores and writes :data:`FILES`, the page of images sorted
    by the first encoder's scores. ``judge`` loads a model that also scores the images by
    DreamBench++'s rubric; its answers are kept in ``out/judge``. ``drift_prompts`` are those of
    :class:`Protocol`. The paper's rows stand beside the paper's encoders only.
    """
    state, runs, inference = join_group(), out / "runs", inference_settings(base)
    protocol = Protocol(
        images_per_prompt, steps=inference.fewest_steps, guidance_scale=inference.guidance_scale,
        drift_prompts=tuple(drift_prompts),
    )  # fmt: skip
    train = dreambench.Tuned(runs, config)
    methods: dict[str, dreambench.Method] = {"base": lambda subject: base, "dreambooth": train}
    for subject in benchmark.subjects:
        if state.is_main_process:
            dreambench.start_or_resume(runs, config, subject)
        state.wait_for_everyone()
        train(subject)
    rank, processes = state.process_index, state.num_processes
    yield from dreambench.draw_all(benchmark, methods, out, protocol, rank, processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    scorers = load_encoders(encoders)
    by_rubric = RubricJudge(judge(), out / "judge") if judge else None
    judges = JUDGES | ({by_rubric.name: by_rubric} if by_rubric else {})
    rows = list(scores.score(benchmark, methods, out, scorers, protocol, judges=judges))
    tables.write_csv(rows, out / "scores.csv")
    # The paper's rows are of prompts by kind; DreamBench++ has each subject's own.
    papers = set(PAPER) <= set(map(str, encoders)) and any(
        subject.kind in benchmark.prompts for subject in benchmark.subjects
    )
    means = scores.means(rows)
    table = f"{tables.markdown(means, published=papers)}\n{tables.explain(means)}"
    if by_rubric and by_rubric.missing:
        table += f"\n{markdown(by_rubric.name)} gave no score to {by_rubric.missing} of "
        table += f"{by_rubric.questions} questions; its words are in `judge`.\n"
    replace_file(out / "report.md", table.encode())
    scored = scores.scored_images(rows, "dreambooth", next(iter(scorers)), benchmark, out)
    save_png(image_grids.extremes(scored), out / "best_median_worst.png")
